// The results as JSON (schema moee.selftest/1) and as tables on the terminal.
#pragma once

#include "checks/results.h"
#include "device/device.h"
#include "report/options.h"
#include "timing/timings.h"

#include <string>
#include <vector>

namespace selftest {

struct Report {
    Options const& options;
    DeviceFacts const& device;
    std::string kernels;               // hash of the kernels' sources
    std::vector<std::string> ptx;      // kernels that the driver compiled
    std::vector<std::string> missing;  // token types that the plugin has no kernels of for this GPU
    std::vector<Case> const& cases;
    Results const& results;
    std::vector<Timing> timings;
    std::string notTimed;  // why nothing was timed; empty if something was
    double seconds;

    // "native", or what was emulated.
    std::string label() const;
    std::string json() const;
    std::string table() const;
};

// Throws `Stop` with code 2 where no file can be written beside `path`.
void requireWritable(std::string const& path);

// Writes the text beside `path` and renames it. Throws `Stop` with code 2 where that fails.
void writeFile(std::string const& path, std::string const& text);

}  // namespace selftest
