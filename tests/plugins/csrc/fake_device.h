// What fake_cuda.cpp and fake_device.cpp know of each other. Without the second, nothing runs: the weak functions are null.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

constexpr int kAllMultiprocessors = 16;
constexpr int kL2Bytes = 1 << 16;
constexpr size_t kModuleBytes = size_t{2} << 20;  // as drivers give memory out

// fake_cuda.cpp
size_t usedBytes();
void setDevice(int sm);
void quiet();  // no log: it would grow without end

// fake_device.cpp. Each returns a CUDA result.
[[gnu::weak]] bool deviceCapturing();
[[gnu::weak]] int deviceRun();  // all that is queued
[[gnu::weak]] int deviceZero(uint64_t to, size_t bytes, void* stream);
[[gnu::weak]] int deviceLaunch(
    std::string const& image, std::string const& symbol, unsigned const* grid, void* stream, void** args);

// How the device is to be, for a program that knows nothing of the double.
inline char const* setting(char const* name) {
    char const* const value = std::getenv(name);
    return value != nullptr ? value : "";
}
inline size_t deviceMemoryBytes() {
    static size_t const bytes = *setting("MOEE_FAKE_MEMORY") != 0 ? std::strtoull(setting("MOEE_FAKE_MEMORY"), nullptr, 10)
                                                                  : size_t{16} << 30;
    return bytes;
}
inline bool planted(char const* name) { return std::string(setting("MOEE_FAKE_FAULT")) == name; }
#define FAULT(name) ([] { static bool const is = planted(name); return is; }())
inline int deviceCount() { return planted("no_gpu") ? 0 : 1; }
