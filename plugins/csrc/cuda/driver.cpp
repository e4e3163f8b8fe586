#include "cuda/driver.h"

#include <dlfcn.h>

#include <mutex>

namespace moee {
namespace {

template <typename Function>
bool find(void* library, char const* name, Function& function, std::string& why) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) {
        why = std::string("libcuda.so.1 has no ") + name + ": update the NVIDIA driver";
    }
    return function != nullptr;
}

bool load(CudaDriver& d, std::string& why) {
    // Never closed: the driver outlives every module that it holds.
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        char const* const reason = dlerror();
        why = std::string("no CUDA driver: ") + (reason != nullptr ? reason : "libcuda.so.1 not found");
        return false;
    }
    return find(library, "cuGetErrorName", d.getErrorName, why)
        && find(library, "cuGetErrorString", d.getErrorString, why)
        && find(library, "cuCtxGetCurrent", d.ctxGetCurrent, why)
        && find(library, "cuCtxPushCurrent_v2", d.ctxPushCurrent, why)
        && find(library, "cuCtxPopCurrent_v2", d.ctxPopCurrent, why)
        && find(library, "cuCtxGetDevice", d.ctxGetDevice, why)
        && find(library, "cuDeviceGetAttribute", d.deviceGetAttribute, why)
        && find(library, "cuModuleLoadDataEx", d.moduleLoadDataEx, why)
        && find(library, "cuModuleGetFunction", d.moduleGetFunction, why)
        && find(library, "cuModuleUnload", d.moduleUnload, why)
        && find(library, "cuFuncSetAttribute", d.funcSetAttribute, why)
        && find(library, "cuMemAlloc_v2", d.memAlloc, why) && find(library, "cuMemFree_v2", d.memFree, why)
        && find(library, "cuMemcpyHtoD_v2", d.memcpyHtoD, why)
        && find(library, "cuMemsetD32Async", d.memsetD32Async, why)
        && find(library, "cuLaunchKernel", d.launchKernel, why);
}

}  // namespace

CudaDriver const* CudaDriver::open(std::string& why) {
    static std::mutex mutex;
    static CudaDriver driver{};
    static bool loaded = false;
    std::lock_guard<std::mutex> const lock(mutex);
    if (!loaded) {
        loaded = load(driver, why);
    }
    return loaded ? &driver : nullptr;
}

std::string CudaDriver::describe(CuResult result) const {
    char const* name = nullptr;
    char const* text = nullptr;
    if (getErrorName(result, &name) != kCuSuccess || name == nullptr) {
        return "CUDA error " + std::to_string(result);
    }
    getErrorString(result, &text);
    return std::string(name) + " (" + (text != nullptr ? text : "no description") + ")";
}

}  // namespace moee
