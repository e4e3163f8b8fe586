// `cases.bin`: layers with tokens and the float64 answer, written by `plugins/library/cases.py`.
#pragma once

#include "operator/operator.h"

#include <cstdint>
#include <string>
#include <vector>

namespace selftest {

constexpr uint32_t kCasesFormat = 1;

struct Case {
    std::string name;
    bool isLayer{false};     // of the exported model, with its own tokens
    moee::Sizes sizes;       // `type` is not set: see `types`
    int64_t neuronCount{0};  // N, the sum of the experts' widths
    uint32_t types{0};       // bit of moee::Type: the answer holds in these types
    uint32_t timed{0};       // types that are timed, a bit each as above
    int32_t perImage{0};     // tokens an image
    int32_t denseWidth{0};   // neurons of the MLP that the layer replaces
    std::vector<float> x, router, routerBias, wUp, bUp, wDown, bOut;
    std::vector<int32_t> neurons, offsets;
    std::vector<int32_t> routes;  // [T * top_k]
    std::vector<double> y;        // [T, D]; NaN where a token holds what is not finite
    std::vector<double> scale;    // [T]: what rounding is relative to

    bool has(moee::Type type) const { return (types >> static_cast<unsigned>(type) & 1U) != 0; }
    bool isTimed(moee::Type type) const { return (timed >> static_cast<unsigned>(type) & 1U) != 0; }
};

// Largest error that is right: `kUnits` of these times the token's `scale`. Half of the unit is the rounding of one hidden
// value or output. Float32 has more room: its sums round as coarsely as its values.
constexpr double kUnits = 8;
double unitOf(moee::Type type);

// Throws `Stop` with code 2 for a file that is missing, cut short, damaged, or of another format or plugin version.
std::vector<Case> readCases(std::string const& path);

}  // namespace selftest
