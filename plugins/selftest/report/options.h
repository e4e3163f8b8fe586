// What the user asked for.
#pragma once

#include <string>
#include <vector>

namespace selftest {

struct Options {
    std::string plugin, cases;
    std::string out{"selftest.json"};
    bool quick{false};
    bool checkOnly{false};
    std::vector<int> batches{1, 8, 32};
    int multiprocessors{0};  // 0: all
    int code{0};             // 0: the device's own kernels
    bool help{false};

    bool emulated() const { return multiprocessors != 0 || code != 0; }
};

// Throws `Stop` with code 2 for what it does not know. `program` is the path that it was started by.
Options readOptions(int argc, char** argv);
extern char const* const kUsage;

}  // namespace selftest
