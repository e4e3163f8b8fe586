// What one tactic computes.
#include "checks/checks.h"

#include "cases/numbers.h"
#include "device/errors.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

namespace selftest {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::string number(double value) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.3g", value);
    return text;
}

std::string at(int64_t token, int64_t channel) {
    return "token " + std::to_string(token) + ", channel " + std::to_string(channel);
}

// Elements that hold the poison after both runs.
int64_t unwritten(Output const& first, Output const& second, moee::Type type) {
    size_t const item = moee::typeBytes(type);
    auto const holds = [item](unsigned char const* bytes, unsigned char poison) {
        return std::all_of(bytes, bytes + item, [poison](unsigned char byte) { return byte == poison; });
    };
    for (size_t i = 0; i < first.y.size(); i += item) {
        if (holds(&first.y[i], kPoison) && holds(&second.y[i], kOtherPoison)) {
            return static_cast<int64_t>(i / item);
        }
    }
    return -1;
}

void checkBounds(Output const& output, Where const& where, Results& results) {
    for (auto const& [what, damage] : {std::pair{"output", output.yDamage}, std::pair{"workspace", output.workspaceDamage}}) {
        results.note(Check::kBounds, where, damage == 0,
            std::string("byte ") + std::to_string(damage) + " relative to the " + what + " was overwritten");
    }
}

void checkRoutes(Subject const& s, Output const& output, int32_t tactic, Where const& where, Results& results) {
    std::vector<int32_t> routes(s.c.routes.size());
    std::memcpy(routes.data(), &output.workspace[s.routesAt(tactic, s.c.sizes.tokens)], routes.size() * sizeof(int32_t));
    auto const [got, want] = std::mismatch(routes.begin(), routes.end(), s.c.routes.begin());
    auto const slot = got - routes.begin();
    results.note(Check::kRoutes, where, got == routes.end(),
        got == routes.end() ? "" : "token " + std::to_string(slot / s.c.sizes.topK) + " went to expert " + std::to_string(*got)
                + " and not to " + std::to_string(*want));
}

void checkGraph(Subject const& s, IPluginV3& attached, Place const& place, std::vector<unsigned char> const& want,
    Where const& where, Results& results) {
    try {
        place.poison(kOtherPoison);
        Graph const graph(s.device, s.stream, [&] { s.enqueue(attached, s.c.sizes.tokens, place, s.stream); });
        for (int replay = 1; replay <= 3; ++replay) {
            place.poisonOutput(kPoison);  // not the workspace: a replay finds what the last one left
            graph.launch();
            s.stream.synchronize();
            results.note(Check::kGraph, where, place.download().y == want, "replay " + std::to_string(replay) + " gives other bits");
        }
    } catch (CudaError const& error) {
        results.note(Check::kGraph, where, false, error.what());
    } catch (PluginError const& error) {
        results.note(Check::kGraph, where, false, error.what());
    }
}

}  // namespace

void compare(Case const& c, std::vector<unsigned char> const& y, int64_t tokens, Where const& where, Results& results, Check as) {
    int64_t const dim = c.sizes.dim;
    double worst = -1;
    Accuracy accuracy{where, 0, 0};
    std::string why;
    for (int64_t t = 0; t < tokens; ++t) {
        int64_t const own = t % c.sizes.tokens;
        double const bound = kUnits * unitOf(where.type) * c.scale[static_cast<size_t>(own)];
        for (int64_t d = 0; d < dim; ++d) {
            double const want = c.y[static_cast<size_t>(own * dim + d)];
            double const got = valueAt(y.data(), static_cast<size_t>(t * dim + d), where.type);
            // A token that is not finite gives NaN, and no other token does.
            bool const isNan = std::isnan(want);
            double const error = isNan ? (std::isnan(got) ? 0 : kInfinity) : std::isnan(got) ? kInfinity : std::abs(got - want);
            bool const right = error <= bound;
            double const ratio = right && bound == 0 ? 0 : error / bound;
            if (ratio > worst) {
                worst = ratio;
                accuracy = {where, error, bound};
            }
            if (!right && why.empty()) {
                why = at(t, d) + " is " + number(got) + " and should be " + number(want) + " within " + number(bound);
            }
        }
    }
    results.note(as, where, why.empty(), why);
    if (as == Check::kAccuracy) {
        results.note(accuracy);
    }
}

void checkTactic(Subject const& s, IPluginV3& attached, int32_t tactic, Results& results) {
    Where const where{s.c.name, s.type, tacticName(tactic)};
    int64_t const tokens = s.c.sizes.tokens;
    Place const place(s.device, s.layer, s.c, s.type);
    s.layer.setTactic(attached, tactic);
    s.layer.setTokens(attached, tokens);
    Output const first = s.run(attached, tokens, place, kPoison);
    Output const second = s.run(attached, tokens, place, kOtherPoison);
    int64_t const missing = unwritten(first, second, s.type);
    results.note(Check::kWritten, where, missing < 0,
        missing < 0 ? "" : at(missing / s.c.sizes.dim, missing % s.c.sizes.dim) + " was not written");
    compare(s.c, first.y, tokens, where, results);
    checkRoutes(s, first, tactic, where, results);
    checkBounds(first, where, results);
    checkBounds(second, where, results);
    auto const [left, right] = std::mismatch(first.y.begin(), first.y.end(), second.y.begin());
    auto const place0 = (left - first.y.begin()) / static_cast<std::ptrdiff_t>(moee::typeBytes(s.type));
    results.note(Check::kRepeat, where, left == first.y.end(),
        left == first.y.end() ? "" : at(place0 / s.c.sizes.dim, place0 % s.c.sizes.dim) + " differs between two runs");
    checkGraph(s, attached, place, first.y, where, results);
}

}  // namespace selftest
