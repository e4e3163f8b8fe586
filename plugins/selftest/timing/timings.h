// Routed against dense: for each layer, type and batch.
#pragma once

#include "device/nvml.h"
#include "timing/dense.h"

#include <functional>
#include <string>
#include <vector>

namespace selftest {

struct Timing {
    std::string name;  // of the case
    moee::Type type;
    int batch;
    int64_t tokens;
    Rounds rounds;
    TacticTimes routed;
    DenseTime dense;
    double macShare;  // routed MACs of a token over dense ones
    Sensors sensors;  // right after it

    Times const& best() const { return routed.all[routed.best].second; }
    double ratio() const { return dense.times.p50Us / best().p50Us; }  // above 1: the routed layer is faster
    // 1 would be a routed layer that saves as much time as MACs.
    double idealShare() const { return dense.times.p50Us * macShare / best().p50Us; }
};

struct TimingPlan {
    std::vector<int> batches;
    bool quick;
    int32_t code;
    uint32_t types;
};

// Times the cases that ask for it. A result that is wrong is noted in `results`. Throws `Stop` with code 3 where memory is short.
std::vector<Timing> timeAll(Device const& device, Library const& plugin, std::vector<Case> const& cases, TimingPlan const& plan,
    Results& results, std::function<void(std::string const&)> const& progress);

}  // namespace selftest
