// Where each buffer lies in the workspace. Mirrors `plugins/workspace.py`; a test compares the two.
#pragma once

#include "operator/operator.h"

#include <cstddef>

namespace moee {

// What a tactic's kernels keep between them.
enum class Kind {
    kTile,    // hidden [T * top_k, max_width]
    kFused,   // no hidden
    kMasked,  // member [K, U] and hidden [T, U]
    kGroup,       // hidden [T, max_width], no counts and no buckets
    kGroupFused,  // the routes alone
};

constexpr size_t kAbsent = ~size_t{0};  // offset of a buffer that the tactic does without

struct Workspace {
    size_t counts{kAbsent};  // [K] int32
    size_t member{kAbsent};  // [K, U] uint8
    size_t zeroed{0};   // bytes from `counts` on that must be zero before the first launch
    size_t buckets{kAbsent};  // [K, T] int32
    size_t routes{0};   // [T * top_k] int32
    size_t hidden{kAbsent};   // T
    size_t partial{kAbsent};  // [T * top_k, D] float32, if top_k > 1
    size_t bytes{0};
};

Workspace layOut(Sizes const& sizes, Kind kind);

}  // namespace moee
