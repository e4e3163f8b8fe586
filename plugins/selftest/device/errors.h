// The three ways in which the self-test ends early or notes a failure.
#pragma once

#include <stdexcept>
#include <string>

namespace selftest {

constexpr int kRight = 0;
constexpr int kWrong = 1;
constexpr int kBadInput = 2;
constexpr int kNoEnvironment = 3;

// Ends the program: one sentence on stderr, and the exit code.
struct Stop : std::runtime_error {
    Stop(int exitCode, std::string const& sentence) : std::runtime_error(sentence), code(exitCode) {}
    int code;
};

// A call of the driver failed. During a check this is a failure of the check.
struct CudaError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The plugin refused a call. During a check this is a failure of the check.
struct PluginError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace selftest
