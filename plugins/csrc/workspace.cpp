#include "workspace.h"

namespace moee {
namespace {

constexpr size_t kAlignment = 256;

size_t roundUp(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

int64_t hiddenStride(Sizes const& sizes, bool masked) {
    return static_cast<int64_t>(roundUp(static_cast<size_t>(masked ? sizes.unionSize : sizes.maxWidth), 16));
}

Workspace layOut(Sizes const& sizes, Needs const& needs) {
    auto const tokens = static_cast<size_t>(sizes.tokens);
    auto const experts = static_cast<size_t>(sizes.experts);
    size_t const slots = tokens * static_cast<size_t>(sizes.topK);
    Workspace w;
    size_t end = 0;
    auto const take = [&end](bool wanted, size_t bytes) {
        size_t const start = end;
        end += wanted ? roundUp(bytes, kAlignment) : 0;
        return start;
    };
    w.counts = take(true, experts * sizeof(int32_t));
    w.member = take(needs.member, experts * static_cast<size_t>(sizes.unionSize));
    w.zeroed = end;
    w.buckets = take(true, experts * tokens * sizeof(int32_t));
    w.routes = take(true, slots * sizeof(int32_t));
    size_t const rows = needs.maskedHidden ? tokens : slots;
    auto const stride = static_cast<size_t>(hiddenStride(sizes, needs.maskedHidden));
    w.hidden = take(needs.hidden, rows * stride * typeBytes(sizes.type));
    w.partial = take(needs.partial, slots * static_cast<size_t>(sizes.dim) * sizeof(float));
    w.bytes = end;
    return w;
}

}  // namespace moee
