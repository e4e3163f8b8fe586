// The CUDA driver, opened with dlopen so that the plugin builds and loads on machines without one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// Declared out here: inside the namespace they would be new types.
struct CUctx_st;
struct CUmod_st;
struct CUfunc_st;
struct CUstream_st;

namespace moee {

// The driver's own types, by its binary interface (cuda.h of CUDA 11 to 13).
using CuResult = int;
using CuDevice = int;
using CuDevicePtr = uint64_t;
using CuContext = CUctx_st*;
using CuModule = CUmod_st*;
using CuFunction = CUfunc_st*;
using CuStream = CUstream_st*;

constexpr CuResult kCuSuccess = 0;
constexpr CuResult kCuInvalidImage = 200;  // CUDA_ERROR_*
constexpr CuResult kCuNoBinary = 209;
constexpr CuResult kCuUnsupportedPtx = 222;
constexpr int kCuComputeCapabilityMajor = 75;  // CU_DEVICE_ATTRIBUTE_*
constexpr int kCuComputeCapabilityMinor = 76;
constexpr int kCuMaxDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kCuJitErrorLogBuffer = 5;      // CU_JIT_*
constexpr int kCuJitErrorLogBufferBytes = 6;

struct CudaDriver {
    CuResult (*getErrorName)(CuResult, char const**);
    CuResult (*getErrorString)(CuResult, char const**);
    CuResult (*ctxGetCurrent)(CuContext*);
    CuResult (*ctxPushCurrent)(CuContext);
    CuResult (*ctxPopCurrent)(CuContext*);
    CuResult (*ctxGetDevice)(CuDevice*);
    CuResult (*deviceGetAttribute)(int*, int, CuDevice);
    CuResult (*moduleLoadDataEx)(CuModule*, void const*, unsigned, int*, void**);
    CuResult (*moduleGetFunction)(CuFunction*, CuModule, char const*);
    CuResult (*moduleUnload)(CuModule);
    CuResult (*funcSetAttribute)(CuFunction, int, int);
    CuResult (*memAlloc)(CuDevicePtr*, size_t);
    CuResult (*memFree)(CuDevicePtr);
    CuResult (*memcpyHtoD)(CuDevicePtr, void const*, size_t);
    CuResult (*memsetD32Async)(CuDevicePtr, unsigned, size_t, CuStream);
    CuResult (*launchKernel)(CuFunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CuStream,
        void**, void**);

    // Opens libcuda.so.1 once. Null with a reason if there is no driver or it lacks a function.
    static CudaDriver const* open(std::string& why);

    // "CUDA_ERROR_X (text)" of a failed call.
    std::string describe(CuResult result) const;
};

}  // namespace moee
