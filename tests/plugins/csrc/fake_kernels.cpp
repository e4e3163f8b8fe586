#include "fake_kernels.h"

#include "cases/numbers.h"
#include "fake_device.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>

using moee::Arg;
using moee::Type;

namespace {

constexpr int64_t kLongRun = 145;  // rows that only timed runs have
uint64_t gLastBuckets = 0;
uint64_t gLastCounts = 0;
std::map<std::pair<Arg, int64_t>, std::vector<float>> gRows;  // that one launch has read so far

int64_t round16(int64_t value) { return (value + 15) / 16 * 16; }

double activate(double v, int64_t activation) {
    switch (activation) {
    case 0:
        return FAULT("tanh_gelu") ? 0.5 * v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)))
                                  : 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    case 1: return 0.5 * v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
    case 2: return v < 0 ? 0 : v;
    case 3: return v / (1 + std::exp(-v));
    case 4: return v / (1 + std::exp(-1.702 * v));
    default: return std::numeric_limits<double>::quiet_NaN();
    }
}

double dot(std::vector<float> const& a, std::vector<float> const& b) {
    std::array<double, 4> sums{};
    size_t i = 0;
    for (; i + 4 <= a.size(); i += 4) {
        for (size_t lane = 0; lane < 4; ++lane) {
            sums[lane] += static_cast<double>(a[i + lane]) * static_cast<double>(b[i + lane]);
        }
    }
    for (; i < a.size(); ++i) {
        sums[0] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

float asTf32(float value) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, 4);
    bits = (bits + 0x1000U) & 0xffffe000U;
    std::memcpy(&value, &bits, 4);
    return value;
}

}  // namespace

moee::Kernel const* findKernel(std::string const& image, std::string const& symbol) {
    moee::Tables const& t = moee::tables();
    for (int32_t i = 0; i < t.kernelCount; ++i) {
        moee::Kernel const& kernel = t.kernels[i];
        // Images of other lengths differ in their first bytes, which hold an ELF file's size or a made-up module's name.
        unsigned char const* const own = moee::moduleImage(kernel.module);
        if (symbol == kernel.symbol && std::memcmp(own, image.data(), 64) == 0 && std::memcmp(own, image.data(), image.size()) == 0) {
            return &kernel;
        }
    }
    return nullptr;
}

Call::Call(moee::Kernel const& kernel, unsigned const* grid, void** args) : mKernel(&kernel), mGrid{grid[0], grid[1], grid[2]} {
    for (int32_t i = 0; i < kernel.argCount; ++i) {
        size_t const bytes = kernel.args[i] <= Arg::kScratch ? 8 : 4;
        std::memcpy(&mValues[static_cast<size_t>(kernel.args[i])], args[i], bytes);
    }
    if (std::strncmp(kernel.role, "group", 5) == 0) {
        mValues[static_cast<size_t>(Arg::kTopK)] = 1;  // no argument: they serve nothing else
    }
}

void Call::run() const {
    gRows.clear();
    std::string const role = mKernel->role;
    if (role == "route" || role == "route_load") {
        route();
    } else if (role == "expert_up") {
        up();
    } else if (role == "expert_down") {
        down();
    } else if (role == "fused") {
        fused();
    } else if (role == "group_up") {
        groupUp();
    } else if (role == "group_down") {
        groupDown();
    } else if (role == "group_fused") {
        groupFused();
    } else if (role == "masked_up") {
        maskedUp();
    } else if (role == "masked_down") {
        maskedDown();
    } else {
        combine();
    }
    overrun();
}

double Call::value(Arg arg, int64_t index) const {
    Type const type = arg == Arg::kRouterBias || arg == Arg::kPartial ? Type::kFloat32 : mKernel->type;
    return static_cast<double>(selftest::valueAt(at<unsigned char>(arg), static_cast<size_t>(index), type));
}

void Call::put(Arg arg, int64_t index, double number) const {
    Type const type = arg == Arg::kPartial ? Type::kFloat32 : mKernel->type;
    selftest::storeAt(at<unsigned char>(arg), static_cast<size_t>(index), static_cast<float>(number), type);
}

std::vector<float> const& Call::row(Arg arg, int64_t index, int64_t length) const {
    std::vector<float>& out = gRows[{arg, index}];
    if (!out.empty()) {
        return out;
    }
    out.resize(static_cast<size_t>(length));
    for (int64_t i = 0; i < length; ++i) {
        out[static_cast<size_t>(i)] = selftest::valueAt(at<unsigned char>(arg), static_cast<size_t>(index * length + i), mKernel->type);
        if (mKernel->type == Type::kFloat32 && FAULT("tf32")) {
            out[static_cast<size_t>(i)] = asTf32(out[static_cast<size_t>(i)]);
        }
    }
    return out;
}

template <typename Visit>
void Call::eachSlot(Visit const& visit) const {
    auto const* const counts = FAULT("shared_buckets") ? reinterpret_cast<int32_t const*>(gLastCounts) : at<int32_t>(Arg::kCounts);
    auto const* const buckets = FAULT("shared_buckets") ? reinterpret_cast<int32_t const*>(gLastBuckets) : at<int32_t>(Arg::kBuckets);
    int64_t tile = 0;
    int64_t const tiles = FAULT("short_grid") ? mGrid[0] - number(Arg::kExperts) : mGrid[0];
    for (int64_t e = 0; e < number(Arg::kExperts); ++e) {
        int64_t const count = std::min<int64_t>(counts[e], number(Arg::kTokens));
        if (count == 0 && FAULT("empty_expert")) {
            visit(e, 0);
        }
        for (int64_t i = 0; i < count; ++i) {
            int64_t const slot = buckets[e * number(Arg::kTokens) + i];
            if (tile + i / mKernel->m < tiles && slot >= 0 && slot < number(Arg::kTokens) * number(Arg::kTopK)) {
                visit(e, slot);
            }
        }
        tile += (count + mKernel->m - 1) / mKernel->m;
    }
}

std::vector<int32_t> Call::choose(int64_t token) const {
    int64_t const experts = number(Arg::kExperts);
    auto const& x = row(Arg::kX, token, number(Arg::kDim));
    std::vector<float> scores;
    for (int64_t e = 0; e < experts; ++e) {
        scores.push_back(static_cast<float>(dot(x, row(Arg::kRouter, e, number(Arg::kDim))) + value(Arg::kRouterBias, e)));
    }
    if (std::any_of(scores.begin(), scores.end(), [](float s) { return !std::isfinite(s); })) {
        scores.assign(scores.size(), 0.0F);
    }
    std::vector<int32_t> order(scores.size());
    for (size_t e = 0; e < order.size(); ++e) {
        order[e] = static_cast<int32_t>(e);
    }
    bool const highest = FAULT("tie_to_highest");
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        float const left = scores[static_cast<size_t>(a)];
        float const right = scores[static_cast<size_t>(b)];
        return left > right || (left == right && highest && a > b);
    });
    order.resize(static_cast<size_t>(number(Arg::kTopK)));
    if (FAULT("swapped_expert") && token % 7 == 3) {
        order[0] = (order[0] + 1) % static_cast<int32_t>(experts);
    }
    return order;
}

std::vector<int32_t> Call::chooseByLoad(int64_t token) const {
    int64_t const experts = number(Arg::kExperts);
    int64_t const topK = number(Arg::kTopK);
    int64_t const start = token % 1000000 * 618033 % 1000000 / topK;
    auto const* const cdf = at<int32_t>(Arg::kLoadCdf);
    std::vector<int32_t> chosen;
    int64_t last = -1;
    for (int64_t j = 0; j < topK; ++j) {
        int64_t const found = std::count_if(cdf, cdf + experts, [&](int32_t end) { return end <= start + j * (1000000 / topK); });
        last = std::min(std::max(found, last + 1), experts - topK + j);
        chosen.push_back(static_cast<int32_t>(last));
    }
    return chosen;
}

void Call::route() const {
    gLastBuckets = mValues[static_cast<size_t>(Arg::kBuckets)];
    gLastCounts = mValues[static_cast<size_t>(Arg::kCounts)];
    int64_t const topK = number(Arg::kTopK);
    bool const members = std::strcmp(mKernel->variant, "members") == 0;
    auto* const counts = at<int32_t>(Arg::kCounts);
    for (int64_t t = 0; t < std::min(number(Arg::kTokens), rows()); ++t) {
        auto const chosen = std::strcmp(mKernel->role, "route") == 0 ? choose(t) : chooseByLoad(t);
        for (int64_t j = 0; j < topK; ++j) {
            int32_t const e = chosen[static_cast<size_t>(j)];
            at<int32_t>(Arg::kRoutes)[t * topK + j] = e;
            if (!members && counts[e] >= 0 && counts[e] < number(Arg::kTokens)) {
                at<int32_t>(Arg::kBuckets)[e * number(Arg::kTokens) + counts[e]++] = static_cast<int32_t>(t * topK + j);
            }
        }
    }
    for (int64_t e = 0; members && e < number(Arg::kExperts); ++e) {
        auto const* const offsets = at<int32_t>(Arg::kOffsets);
        for (int32_t i = offsets[e]; i < offsets[e + 1]; ++i) {
            at<unsigned char>(Arg::kMember)[e * number(Arg::kUnionSize) + at<int32_t>(Arg::kNeurons)[i]] = 1;
        }
    }
}

std::vector<double> Call::hiddenRow(int64_t, int64_t token, int64_t begin, int64_t width) const {
    int64_t const dim = number(Arg::kDim);
    auto const& x = row(Arg::kX, token, dim);
    std::vector<double> hidden;
    for (int64_t n = 0; n < width; ++n) {
        int64_t const neuron = at<int32_t>(Arg::kNeurons)[begin + (FAULT("wrong_offset") ? (n + 1) % width : n)];
        double const sum = dot(x, row(Arg::kWUp, neuron, dim)) + value(Arg::kBUp, at<int32_t>(Arg::kNeurons)[begin + n]);
        hidden.push_back(activate(sum, number(Arg::kActivation)));
    }
    return hidden;
}

void Call::up() const {
    auto const* const offsets = at<int32_t>(Arg::kOffsets);
    eachSlot([&](int64_t e, int64_t slot) {
        int64_t const width = offsets[e + 1] - offsets[e];
        auto const hidden = hiddenRow(e, slot / number(Arg::kTopK), offsets[e], width);
        for (int64_t n = 0; n < std::min(round16(width), columns()); ++n) {
            put(Arg::kHidden, slot * round16(number(Arg::kMaxWidth)) + n, n < width ? hidden[static_cast<size_t>(n)] : 0);
        }
    });
    if (FAULT("input_written")) {
        put(Arg::kWUp, number(Arg::kDim), 0.5);
    }
}

void Call::down() const {
    eachSlot([&](int64_t e, int64_t slot) { downRow(e, slot); });
}

void Call::downRow(int64_t e, int64_t slot) const {
    auto const* const offsets = at<int32_t>(Arg::kOffsets);
    int64_t const dim = number(Arg::kDim);
    std::vector<double> sums(static_cast<size_t>(dim));
    for (int64_t n = 0; n < offsets[e + 1] - offsets[e]; ++n) {
        auto hidden = value(Arg::kHidden, slot * round16(number(Arg::kMaxWidth)) + n);
        hidden = mKernel->type == Type::kFloat32 && FAULT("tf32") ? static_cast<double>(asTf32(static_cast<float>(hidden))) : hidden;
        auto const& w = row(Arg::kWDown, at<int32_t>(Arg::kNeurons)[offsets[e] + n], dim);
        for (int64_t d = 0; d < std::min(dim, columns()); ++d) {
            sums[static_cast<size_t>(d)] += hidden * static_cast<double>(w[static_cast<size_t>(d)]);
        }
    }
    finish(e, slot, std::move(sums));
}

void Call::fused() const {
    eachSlot([&](int64_t e, int64_t slot) { fusedRow(e, slot / number(Arg::kTopK), slot); });
}

void Call::fusedRow(int64_t e, int64_t token, int64_t slot) const {
    auto const* const offsets = at<int32_t>(Arg::kOffsets);
    int64_t const dim = number(Arg::kDim);
    int64_t const width = offsets[e + 1] - offsets[e];
    auto const hidden = hiddenRow(e, token, offsets[e], width);
    std::vector<double> sums(static_cast<size_t>(dim));
    for (int64_t n = 0; n < width; ++n) {
        std::array<unsigned char, 4> kept{};
        selftest::storeAt(kept.data(), 0, static_cast<float>(hidden[static_cast<size_t>(n)]), mKernel->type);
        auto const& w = row(Arg::kWDown, at<int32_t>(Arg::kNeurons)[offsets[e] + n], dim);
        for (int64_t d = 0; d < dim; ++d) {
            sums[static_cast<size_t>(d)] += static_cast<double>(selftest::valueAt(kept.data(), 0, mKernel->type))
                * static_cast<double>(w[static_cast<size_t>(d)]);
        }
    }
    finish(e, slot, std::move(sums));
}

// Adds the expert's output bias and scatters the row.
void Call::finish(int64_t expert, int64_t slot, std::vector<double> sums) const {
    int64_t const dim = number(Arg::kDim);
    for (int64_t d = 0; d < dim; ++d) {
        sums[static_cast<size_t>(d)] += value(Arg::kBOut, expert * dim + d);
    }
    if (number(Arg::kTopK) == 1) {
        storeOutput(slot, sums);
        return;
    }
    for (int64_t d = 0; d < dim; ++d) {
        put(Arg::kPartial, slot * dim + d, sums[static_cast<size_t>(d)]);
    }
}

void Call::storeOutput(int64_t row, std::vector<double> const& sums) const {
    auto const dim = static_cast<int64_t>(sums.size());
    bool const last = row == number(Arg::kTokens) - 1;
    if (FAULT("unwritten_row") && last) {
        return;
    }
    bool const isNan = std::isnan(sums[0]);
    for (int64_t d = 0; d < dim; ++d) {
        put(Arg::kY, row * dim + d, sums[static_cast<size_t>(d)] + (FAULT("long_run") && row >= kLongRun ? 1 : 0));
    }
    if (FAULT("nan_spreads") && isNan) {
        put(Arg::kY, 0, sums[0]);
    }
    static std::map<uint64_t, int64_t> most;
    int64_t& tokens = most[mValues[static_cast<size_t>(Arg::kY)]];
    tokens = std::max(tokens, number(Arg::kTokens));
    if (FAULT("stale_shape") && last && row + 1 < tokens) {
        put(Arg::kY, (row + 1) * dim, 1);
    }
    if (FAULT("output_overrun") && last) {
        put(Arg::kY, (row + 1) * dim, 1);
    }
    if (FAULT("last_bit")) {
        at<unsigned char>(Arg::kY)[static_cast<size_t>(row * dim) * moee::typeBytes(mKernel->type)] ^= static_cast<unsigned char>(std::rand() & 1);
    }
}

void Call::maskedUp() const {
    int64_t const dim = number(Arg::kDim);
    int64_t const unionSize = number(Arg::kUnionSize);
    for (int64_t t = 0; t < std::min(number(Arg::kTokens), rows()); ++t) {
        auto const& x = row(Arg::kX, t, dim);
        for (int64_t n = 0; n < std::min(round16(unionSize), columns()); ++n) {
            double weight = 0;
            for (int64_t j = 0; n < unionSize && j < number(Arg::kTopK); ++j) {
                int64_t const e = at<int32_t>(Arg::kRoutes)[t * number(Arg::kTopK) + j];
                weight += e >= 0 && e < 4096 ? at<unsigned char>(Arg::kMember)[e * unionSize + n] : 0;
            }
            double const hidden
                = weight > 0 ? activate(dot(x, row(Arg::kWUp, n, dim)) + value(Arg::kBUp, n), number(Arg::kActivation)) * weight : 0;
            put(Arg::kHidden, t * round16(unionSize) + n, hidden);
        }
    }
}

void Call::maskedDown() const {
    int64_t const dim = number(Arg::kDim);
    int64_t const unionSize = number(Arg::kUnionSize);
    for (int64_t t = 0; t < std::min(number(Arg::kTokens), rows()); ++t) {
        std::vector<double> sums(static_cast<size_t>(dim));
        for (int64_t n = 0; n < unionSize; ++n) {
            double hidden = value(Arg::kHidden, t * round16(unionSize) + n);
            hidden = mKernel->type == Type::kFloat32 && FAULT("tf32") ? static_cast<double>(asTf32(static_cast<float>(hidden))) : hidden;
            auto const& w = row(Arg::kWDown, n, dim);
            for (int64_t d = 0; hidden != 0 && d < dim; ++d) {
                sums[static_cast<size_t>(d)] += hidden * static_cast<double>(w[static_cast<size_t>(d)]);
            }
        }
        for (int64_t j = 0; j < number(Arg::kTopK); ++j) {
            int64_t const e = at<int32_t>(Arg::kRoutes)[t * number(Arg::kTopK) + j];
            for (int64_t d = 0; e >= 0 && d < dim; ++d) {
                sums[static_cast<size_t>(d)] += value(Arg::kBOut, e * dim + d);
            }
        }
        if (FAULT("one_tactic") && mKernel->m == 16) {
            sums[0] += 1;
        }
        storeOutput(t, sums);
    }
}

void Call::combine() const {
    int64_t const dim = number(Arg::kDim);
    int64_t const topK = number(Arg::kTopK);
    for (int64_t t = 0; t < std::min(number(Arg::kTokens), rows()); ++t) {
        std::vector<double> sums(static_cast<size_t>(dim));
        for (int64_t j = 0; j < topK - (FAULT("lost_partial") ? 1 : 0); ++j) {
            for (int64_t d = 0; d < dim; ++d) {
                sums[static_cast<size_t>(d)] += value(Arg::kPartial, (t * topK + j) * dim + d);
            }
        }
        storeOutput(t, sums);
    }
}

// One byte behind the largest workspace: that of the masked kernels' hidden values, or of the partial sums.
void Call::overrun() const {
    if (!FAULT("workspace_overrun") || std::strcmp(mKernel->role, "masked_up") != 0) {
        return;
    }
    size_t const bytes = static_cast<size_t>(number(Arg::kTokens) * round16(number(Arg::kUnionSize))) * moee::typeBytes(mKernel->type);
    at<unsigned char>(Arg::kHidden)[(bytes + 255) / 256 * 256] = 0;
}
