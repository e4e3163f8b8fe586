#include "operator/workspace.h"

namespace moee {
namespace {

constexpr size_t kAlignment = 256;

size_t roundUp(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

Workspace layOut(Sizes const& sizes, Kind kind) {
    auto const tokens = static_cast<size_t>(sizes.tokens);
    auto const experts = static_cast<size_t>(sizes.experts);
    auto const unionSize = static_cast<size_t>(sizes.unionSize);
    size_t const slots = tokens * static_cast<size_t>(sizes.topK);
    Workspace w;
    auto const take = [&w](size_t bytes) {
        size_t const start = w.bytes;
        w.bytes += roundUp(bytes, kAlignment);
        return start;
    };
    bool const grouped = kind == Kind::kGroup || kind == Kind::kGroupFused;
    if (!grouped) {
        w.counts = take(experts * sizeof(int32_t));
        if (kind == Kind::kMasked) {
            w.member = take(experts * unionSize);
        }
        w.zeroed = w.bytes;
        w.buckets = take(experts * tokens * sizeof(int32_t));
    }
    w.routes = take(slots * sizeof(int32_t));
    // Rows of hidden start on 16-element boundaries; the kernels compute the same stride.
    if (kind == Kind::kMasked) {
        w.hidden = take(tokens * roundUp(unionSize, 16) * typeBytes(sizes.type));
    } else if (kind == Kind::kTile || kind == Kind::kGroup) {
        w.hidden = take(slots * roundUp(static_cast<size_t>(sizes.maxWidth), 16) * typeBytes(sizes.type));
    }
    if (kind != Kind::kMasked && !grouped && sizes.topK > 1) {
        w.partial = take(slots * static_cast<size_t>(sizes.dim) * sizeof(float));
    }
    return w;
}

}  // namespace moee
