// Clocks, power and temperature by NVML, where there is one.
#pragma once

#include <optional>
#include <string>

namespace selftest {

struct Sensors {
    std::optional<int> smMhz, memoryMhz, powerMilliwatts, celsius;
    bool any() const { return smMhz || memoryMhz || powerMilliwatts || celsius; }
};

class Nvml {
public:
    // `pciBus` as the driver names it. Without NVML, or for a GPU that it does not know, there is nothing to read.
    explicit Nvml(std::string const& pciBus);
    ~Nvml();
    Nvml(Nvml const&) = delete;
    Nvml& operator=(Nvml const&) = delete;

    Sensors read() const;

private:
    void* mLibrary{nullptr};
    void* mDevice{nullptr};
};

}  // namespace selftest
