// The dense FFN that the routed layer replaces, timed by the same clock.
#pragma once

#include "checks/checks.h"
#include "timing/blaslt.h"
#include "timing/clock.h"

#include <string>
#include <vector>

namespace selftest {

struct DenseTime {
    std::string by;    // cuBLASLt with its version, or our own kernels
    std::string note;  // what differs from the layer's dense FFN; empty if nothing
    Times times;
};

// How often and over how many sets of buffers.
struct Rounds {
    size_t sets;
    int samples;
};

// Times the dense FFN of the case's width on the same tokens: by `library`, or by the plugin as one expert of all neurons where
// that is null, for `why`. Weights are the case's own, repeated. Throws `CudaError` where a result is wrong.
DenseTime timeDense(Device const& device, Library const& plugin, BlasLt const* library, std::string const& why, Case const& c,
    moee::Type type, int64_t tokens, Rounds const& rounds, int32_t code);

// Each tactic's times, and which is the fastest. `results`, where it is given, gets whether what each computed is the answer.
struct TacticTimes {
    std::vector<std::pair<int32_t, Times>> all;
    size_t best{0};
};
TacticTimes timeTactics(Device const& device, Library const& plugin, Case const& c, moee::Type type, int64_t tokens,
    Rounds const& rounds, int32_t code, Results* results);

}  // namespace selftest
