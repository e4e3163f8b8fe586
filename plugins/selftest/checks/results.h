// What the checks found: counts and failures by check, errors by case, type and tactic.
#pragma once

#include "operator/operator.h"

#include <cstdint>
#include <string>
#include <vector>

namespace selftest {

// The checks, in the order in which they are shown.
enum class Check : uint8_t { kAccuracy, kRoutes, kWritten, kBounds, kInputs, kRepeat, kGraph, kStreams, kShapes, kMemory, kCalls, kTimed };
constexpr size_t kChecks = 12;
char const* checkName(Check check);
char const* checkMeaning(Check check);

struct Where {
    std::string name;  // of the case
    moee::Type type;
    std::string tactic;
    std::string text() const { return name + ", " + moee::typeName(type) + ", " + tactic; }
};

struct Accuracy {
    Where where;
    double error;  // of the worst element
    double bound;  // there
};

struct WorkspaceBytes {
    std::string name;  // of the case
    moee::Type type;
    size_t bytes;
};

class Results {
public:
    // Without `timed`, nothing is timed, and its check is not asked for.
    explicit Results(bool timed) : mTimed(timed) {}

    // Counts one comparison; keeps where it failed and why.
    void note(Check check, Where const& where, bool right, std::string const& why);
    void note(Accuracy const& accuracy) { mAccuracies.push_back(accuracy); }
    void note(WorkspaceBytes const& workspace) { mWorkspaces.push_back(workspace); }

    int64_t count(Check check) const { return mCounts[index(check)]; }
    int64_t failed(Check check) const { return mFailed[index(check)]; }
    std::vector<std::string> const& failures(Check check) const { return mFailures[index(check)]; }  // the first few
    std::vector<Accuracy> const& accuracies() const { return mAccuracies; }
    std::vector<WorkspaceBytes> const& workspaces() const { return mWorkspaces; }
    // A check that compared nothing has not passed.
    bool passed(Check check) const { return count(check) > 0 && failed(check) == 0; }
    bool passed() const;
    bool failed() const;  // something that was compared is wrong
    bool wanted(Check check) const { return check != Check::kTimed || mTimed; }

private:
    static size_t index(Check check) { return static_cast<size_t>(check); }
    bool mTimed;
    int64_t mCounts[kChecks]{};
    int64_t mFailed[kChecks]{};
    std::vector<std::string> mFailures[kChecks];
    std::vector<Accuracy> mAccuracies;
    std::vector<WorkspaceBytes> mWorkspaces;
};

}  // namespace selftest
