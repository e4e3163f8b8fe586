// The checks: numbers of each tactic, and lives of a layer as engines lead them.
#pragma once

#include "checks/results.h"
#include "checks/subject.h"

#include <functional>

namespace selftest {

// Poisons: NaN in every float type and -1 in every integer type; then anything else.
constexpr unsigned char kPoison = 0xFF;
constexpr unsigned char kOtherPoison = 0x5A;

// Whether `y`, the first `tokens` rows, is the case's answer; more tokens than the case has are its own again. Notes the worst
// error.
void compare(Case const& c, std::vector<unsigned char> const& y, int64_t tokens, Where const& where, Results& results,
    Check as = Check::kAccuracy);

// numbers.cpp: accuracy, routes, written, bounds, repeat and graph for one tactic.
void checkTactic(Subject const& subject, IPluginV3& attached, int32_t tactic, Results& results);

// lives.cpp
void checkStreams(Subject const& subject, int32_t tactic, Results& results);
void checkShapes(Subject const& subject, int32_t tactic, Results& results);
void checkMemory(Device const& device, Library const& library, Case const& c, moee::Type type, int32_t code, int rounds,
    Results& results);

// Everything, for all cases in all of their types that `types` (bits of moee::Type) has. `progress` gets each case's name
// before it starts.
struct Plan {
    uint32_t types;
    int32_t code;
    int memoryRounds;
};
void checkAll(Device const& device, Library const& library, std::vector<Case> const& cases, Plan const& plan, Results& results,
    std::function<void(std::string const&)> const& progress);

}  // namespace selftest
