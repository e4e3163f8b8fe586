#include "checks/results.h"

#include <algorithm>
#include <iterator>

namespace selftest {
namespace {

constexpr size_t kKept = 10;  // failures of one check that are written down

struct Text {
    char const* name;
    char const* meaning;
};
constexpr Text kTexts[kChecks] = {
    {"accuracy", "the output is the float64 answer within the type's bound"},
    {"routes", "every token goes to the experts of the float64 answer"},
    {"written", "every element of the output is written"},
    {"bounds", "nothing is written around the output and the workspace"},
    {"inputs", "tokens and weights are as they were"},
    {"repeat", "a second run gives the same bits, whatever memory held"},
    {"graph", "captured in a CUDA graph, and three replays give the same bits"},
    {"streams", "two contexts on two streams at once give the bits that each gives alone"},
    {"shapes", "right for other numbers of tokens, and again for the first"},
    {"memory", "made and destroyed again and again, device memory does not grow"},
    {"calls", "the driver and the plugin refused no call"},
    {"timed", "what was timed is the float64 answer too"},
};

}  // namespace

char const* checkName(Check check) { return kTexts[static_cast<size_t>(check)].name; }
char const* checkMeaning(Check check) { return kTexts[static_cast<size_t>(check)].meaning; }

void Results::note(Check check, Where const& where, bool right, std::string const& why) {
    ++mCounts[index(check)];
    if (right) {
        return;
    }
    ++mFailed[index(check)];
    if (mFailures[index(check)].size() < kKept) {
        mFailures[index(check)].push_back(where.text() + ": " + why);
    }
}

bool Results::failed() const {
    return std::any_of(std::begin(mFailed), std::end(mFailed), [](int64_t count) { return count > 0; });
}

bool Results::passed() const {
    for (size_t i = 0; i < kChecks; ++i) {
        auto const check = static_cast<Check>(i);
        if (wanted(check) && !passed(check)) {
            return false;
        }
    }
    return true;
}

}  // namespace selftest
