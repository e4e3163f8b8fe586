#include "timing/timings.h"

#include "device/errors.h"

#include <algorithm>

namespace selftest {
namespace {

constexpr size_t kMostSets = 64;
constexpr int kSamples = 50;
constexpr int kQuickSamples = 15;

// MACs of the chosen experts and the router, over those of the dense FFN; mean of the case's tokens.
double macShare(Case const& c) {
    double neurons = 0;
    for (int32_t const expert : c.routes) {
        neurons += c.offsets[static_cast<size_t>(expert) + 1] - c.offsets[static_cast<size_t>(expert)];
    }
    return (2 * neurons / static_cast<double>(c.sizes.tokens) + c.sizes.experts) / (2.0 * c.denseWidth);
}

// Sets of buffers that together are twice the L2, so that no call finds its weights there.
size_t setsFor(Device const& device, Case const& c, moee::Type type, int64_t tokens) {
    size_t const item = moee::typeBytes(type);
    auto const bytes = static_cast<size_t>(c.sizes.dim) * item * static_cast<size_t>(2 * c.sizes.unionSize + 2 * tokens);
    return std::clamp(2 * device.facts().l2Bytes / bytes + 1, size_t{2}, kMostSets);
}

}  // namespace

std::vector<Timing> timeAll(Device const& device, Library const& plugin, std::vector<Case> const& cases, TimingPlan const& plan,
    Results& results, std::function<void(std::string const&)> const& progress) {
    std::string why;
    auto const library = BlasLt::open(why);
    Nvml const nvml(device.facts().pciBus);
    std::vector<Timing> timings;
    for (Case const& c : cases) {
        if (c.timed == 0) {
            continue;
        }
        for (auto const type : {moee::Type::kFloat16, moee::Type::kBfloat16, moee::Type::kFloat32}) {
            if (!c.isTimed(type) || (plan.types >> static_cast<unsigned>(type) & 1U) == 0) {
                continue;
            }
            for (int const batch : plan.batches) {
                int64_t const tokens = int64_t{batch} * c.perImage;
                progress(c.name + ", " + moee::typeName(type) + ", batch " + std::to_string(batch));
                Rounds const rounds{setsFor(device, c, type, tokens), plan.quick ? kQuickSamples : kSamples};
                try {
                    TacticTimes routed = timeTactics(device, plugin, c, type, tokens, rounds, plan.code, &results);
                    DenseTime dense = timeDense(device, plugin, library.get(), why, c, type, tokens, rounds, plan.code);
                    timings.push_back({c.name, type, batch, tokens, rounds, std::move(routed), std::move(dense), macShare(c), nvml.read()});
                } catch (CudaError const& error) {
                    results.note(Check::kTimed, {c.name, type, "batch " + std::to_string(batch)}, false, error.what());
                } catch (PluginError const& error) {
                    results.note(Check::kTimed, {c.name, type, "batch " + std::to_string(batch)}, false, error.what());
                }
            }
            if (plan.quick) {
                return timings;
            }
        }
    }
    return timings;
}

}  // namespace selftest
