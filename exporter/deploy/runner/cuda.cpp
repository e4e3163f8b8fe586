#include "cuda.h"

#include <dlfcn.h>

#include <stdexcept>

struct CUctx_st;

namespace moee {
namespace {

void* function(char const* name) {
    // Never closed: TensorRT uses it until the process ends.
    static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) {
        throw std::runtime_error("no CUDA driver (libcuda.so.1 not found): run this on the device");
    }
    void* const found = dlsym(library, name);
    if (found == nullptr) {
        throw std::runtime_error(std::string("the CUDA driver has no ") + name + ": update it");
    }
    return found;
}

// Calls a driver function by name; a failure throws with the driver's name of the error.
template <typename... Arguments>
void call(char const* name, Arguments... arguments) {
    int const result = reinterpret_cast<int (*)(Arguments...)>(function(name))(arguments...);
    if (result != 0) {
        char const* text = nullptr;
        reinterpret_cast<int (*)(int, char const**)>(function("cuGetErrorName"))(result, &text);
        throw std::runtime_error(std::string(name) + ": " + (text != nullptr ? text : std::to_string(result)));
    }
}

}  // namespace

Device::Device(int ordinal) {
    call("cuInit", 0U);
    call("cuDeviceGet", &mDevice, ordinal);
    char name[256] = {};
    call("cuDeviceGetName", static_cast<char*>(name), static_cast<int>(sizeof(name) - 1), mDevice);
    mName = name;
    CUctx_st* context = nullptr;
    call("cuDevicePrimaryCtxRetain", &context, mDevice);
    call("cuCtxSetCurrent", context);
    call("cuStreamCreate", &mStream, 1U);  // CU_STREAM_NON_BLOCKING
}

Device::~Device() {
    try {
        call("cuStreamDestroy_v2", mStream);
        call("cuDevicePrimaryCtxRelease_v2", mDevice);
    } catch (std::runtime_error const&) {
        // the process ends; the driver takes everything back
    }
}

void Device::upload(uint64_t device, void const* host, size_t bytes) {
    call("cuMemcpyHtoDAsync_v2", device, host, bytes, mStream);
}

void Device::download(void* host, uint64_t device, size_t bytes) { call("cuMemcpyDtoHAsync_v2", host, device, bytes, mStream); }

void Device::synchronise() { call("cuStreamSynchronize", mStream); }

Buffer::Buffer(size_t bytes) { call("cuMemAlloc_v2", &mAddress, bytes); }

Buffer::~Buffer() {
    try {
        call("cuMemFree_v2", mAddress);
    } catch (std::runtime_error const&) {
        // as above
    }
}

}  // namespace moee
