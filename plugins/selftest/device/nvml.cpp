#include "device/nvml.h"

#include <dlfcn.h>

namespace selftest {
namespace {

// nvml.h
constexpr int kClockSm = 1;      // NVML_CLOCK_SM
constexpr int kClockMemory = 2;  // NVML_CLOCK_MEM
constexpr int kTemperatureGpu = 0;

template <typename Function>
Function find(void* library, char const* name) {
    return reinterpret_cast<Function>(dlsym(library, name));
}

template <typename... Arguments>
std::optional<int> value(void* library, char const* name, void* device, Arguments... arguments) {
    auto const get = find<int (*)(void*, Arguments..., unsigned*)>(library, name);
    unsigned read = 0;
    return get != nullptr && get(device, arguments..., &read) == 0 ? std::optional<int>(static_cast<int>(read)) : std::nullopt;
}

}  // namespace

Nvml::Nvml(std::string const& pciBus) {
    mLibrary = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (mLibrary == nullptr) {
        return;
    }
    auto const init = find<int (*)()>(mLibrary, "nvmlInit_v2");
    auto const handle = find<int (*)(char const*, void**)>(mLibrary, "nvmlDeviceGetHandleByPciBusId_v2");
    if (init == nullptr || handle == nullptr || init() != 0 || handle(pciBus.c_str(), &mDevice) != 0) {
        mDevice = nullptr;
    }
}

Nvml::~Nvml() {
    if (auto const shutdown = mDevice != nullptr ? find<int (*)()>(mLibrary, "nvmlShutdown") : nullptr) {
        shutdown();
    }
}

Sensors Nvml::read() const {
    if (mDevice == nullptr) {
        return {};
    }
    return {value(mLibrary, "nvmlDeviceGetClockInfo", mDevice, kClockSm),
        value(mLibrary, "nvmlDeviceGetClockInfo", mDevice, kClockMemory),
        value(mLibrary, "nvmlDeviceGetPowerUsage", mDevice), value(mLibrary, "nvmlDeviceGetTemperature", mDevice, kTemperatureGpu)};
}

}  // namespace selftest
