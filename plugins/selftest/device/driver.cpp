#include "device/driver.h"

#include "device/errors.h"

#include <dlfcn.h>

namespace selftest {
namespace {

template <typename Function>
void find(void* library, char const* name, Function& function, bool needed = true) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr && needed) {
        throw Stop(kNoEnvironment, std::string("libcuda.so.1 has no ") + name + ": update the NVIDIA driver");
    }
}

void load(Driver& d) {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        throw Stop(kNoEnvironment, "no CUDA driver: libcuda.so.1 was not found; install the NVIDIA driver of this machine's GPU");
    }
    find(library, "cuInit", d.init);
    find(library, "cuDriverGetVersion", d.driverGetVersion);
    find(library, "cuDeviceGetCount", d.deviceGetCount);
    find(library, "cuDeviceGet", d.deviceGet);
    find(library, "cuDeviceGetName", d.deviceGetName);
    find(library, "cuDeviceTotalMem_v2", d.deviceTotalMem);
    find(library, "cuDeviceGetAttribute", d.deviceGetAttribute);
    find(library, "cuDeviceGetPCIBusId", d.deviceGetPciBusId);
    find(library, "cuDevicePrimaryCtxRetain", d.primaryCtxRetain);
    find(library, "cuDevicePrimaryCtxRelease_v2", d.primaryCtxRelease);
    find(library, "cuCtxSetCurrent", d.ctxSetCurrent);
    find(library, "cuCtxSynchronize", d.ctxSynchronize);
    find(library, "cuMemGetInfo_v2", d.memGetInfo);
    find(library, "cuMemAlloc_v2", d.memAlloc);
    find(library, "cuMemFree_v2", d.memFree);
    find(library, "cuMemcpyHtoD_v2", d.memcpyHtoD);
    find(library, "cuMemcpyDtoH_v2", d.memcpyDtoH);
    find(library, "cuMemcpyDtoD_v2", d.memcpyDtoD);
    find(library, "cuMemsetD8_v2", d.memsetD8);
    find(library, "cuStreamCreate", d.streamCreate);
    find(library, "cuStreamDestroy_v2", d.streamDestroy);
    find(library, "cuStreamSynchronize", d.streamSynchronize);
    find(library, "cuStreamBeginCapture_v2", d.streamBeginCapture);
    find(library, "cuStreamEndCapture", d.streamEndCapture);
    find(library, "cuGraphInstantiateWithFlags", d.graphInstantiate);
    find(library, "cuGraphLaunch", d.graphLaunch);
    find(library, "cuGraphExecDestroy", d.graphExecDestroy);
    find(library, "cuGraphDestroy", d.graphDestroy);
    find(library, "cuEventCreate", d.eventCreate);
    find(library, "cuEventDestroy_v2", d.eventDestroy);
    find(library, "cuEventRecord", d.eventRecord);
    find(library, "cuEventSynchronize", d.eventSynchronize);
    find(library, "cuEventElapsedTime", d.eventElapsedTime);
    find(library, "cuDeviceGetDevResource", d.deviceGetDevResource, false);
    find(library, "cuDevSmResourceSplitByCount", d.smResourceSplitByCount, false);
    find(library, "cuDevResourceGenerateDesc", d.resourceGenerateDesc, false);
    find(library, "cuGreenCtxCreate", d.greenCtxCreate, false);
    find(library, "cuGreenCtxDestroy", d.greenCtxDestroy, false);
    find(library, "cuCtxFromGreenCtx", d.ctxFromGreenCtx, false);
    find(library, "cuGreenCtxStreamCreate", d.greenCtxStreamCreate, false);
}

}  // namespace

Driver const& Driver::open() {
    static Driver driver = [] {
        Driver made{};
        load(made);
        return made;
    }();
    return driver;
}

void Driver::check(CuResult result, char const* call) {
    if (result == moee::kCuSuccess) {
        return;
    }
    std::string why;
    moee::CudaDriver const* const names = moee::CudaDriver::open(why);
    throw CudaError(std::string(call) + " failed: "
        + (names != nullptr ? names->describe(result) : "CUDA error " + std::to_string(result)));
}

}  // namespace selftest
