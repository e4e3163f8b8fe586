// Where each buffer lies in the workspace. Mirrors `plugins/workspace.py`; a test compares the two.
#pragma once

#include "operator.h"

#include <cstddef>

namespace moee {

// Which buffers a tactic's kernels name among their arguments.
struct Needs {
    bool member{false};
    bool hidden{false};
    bool maskedHidden{false};  // [T, U] instead of [T * top_k, max_width]
    bool partial{false};
};

struct Workspace {
    size_t counts{0};   // [K] int32
    size_t member{0};   // [K, U] uint8
    size_t zeroed{0};   // bytes from `counts` on that must be zero before the first launch
    size_t buckets{0};  // [K, T] int32
    size_t routes{0};   // [T * top_k] int32
    size_t hidden{0};   // T
    size_t partial{0};  // [T * top_k, D] float32
    size_t bytes{0};
};

Workspace layOut(Sizes const& sizes, Needs const& needs);

// Row stride of `hidden` in elements.
int64_t hiddenStride(Sizes const& sizes, bool masked);

}  // namespace moee
