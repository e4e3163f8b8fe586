// The CUDA driver as the self-test calls it: opened with dlopen, so that the program starts on machines without one.
#pragma once

#include "cuda/driver.h"

#include <string>

// Declared out here: inside the namespace they would be new types.
struct CUevent_st;
struct CUgraph_st;
struct CUgraphExec_st;
struct CUgreenCtx_st;
struct CUdevResourceDesc_st;

namespace selftest {

using moee::CuContext;
using moee::CuDevice;
using moee::CuDevicePtr;
using moee::CuResult;
using moee::CuStream;
using CuEvent = CUevent_st*;
using CuGraph = CUgraph_st*;
using CuGraphExec = CUgraphExec_st*;
using CuGreenContext = CUgreenCtx_st*;
using CuResourceDesc = CUdevResourceDesc_st*;

constexpr CuResult kOutOfMemory = 2;  // CUDA_ERROR_OUT_OF_MEMORY
constexpr int kMultiprocessors = 16;  // CU_DEVICE_ATTRIBUTE_*
constexpr int kL2Bytes = 38;
constexpr unsigned kNonBlocking = 1;  // CU_STREAM_NON_BLOCKING
constexpr int kResourceSm = 1;        // CU_DEV_RESOURCE_TYPE_SM

// CUdevResource of cuda.h: a kind, padding, then for multiprocessors their count. Longer than any version's.
struct DevResource {
    int type{0};
    unsigned char padding[92]{};
    unsigned smCount{0};
    unsigned char rest[412]{};
};

struct Driver {
    CuResult (*init)(unsigned);
    CuResult (*driverGetVersion)(int*);
    CuResult (*deviceGetCount)(int*);
    CuResult (*deviceGet)(CuDevice*, int);
    CuResult (*deviceGetName)(char*, int, CuDevice);
    CuResult (*deviceTotalMem)(size_t*, CuDevice);
    CuResult (*deviceGetAttribute)(int*, int, CuDevice);
    CuResult (*deviceGetPciBusId)(char*, int, CuDevice);
    CuResult (*primaryCtxRetain)(CuContext*, CuDevice);
    CuResult (*primaryCtxRelease)(CuDevice);
    CuResult (*ctxSetCurrent)(CuContext);
    CuResult (*ctxSynchronize)();
    CuResult (*memGetInfo)(size_t*, size_t*);
    CuResult (*memAlloc)(CuDevicePtr*, size_t);
    CuResult (*memFree)(CuDevicePtr);
    CuResult (*memcpyHtoD)(CuDevicePtr, void const*, size_t);
    CuResult (*memcpyDtoH)(void*, CuDevicePtr, size_t);
    CuResult (*memcpyDtoD)(CuDevicePtr, CuDevicePtr, size_t);
    CuResult (*memsetD8)(CuDevicePtr, unsigned char, size_t);
    CuResult (*streamCreate)(CuStream*, unsigned);
    CuResult (*streamDestroy)(CuStream);
    CuResult (*streamSynchronize)(CuStream);
    CuResult (*streamBeginCapture)(CuStream, int);
    CuResult (*streamEndCapture)(CuStream, CuGraph*);
    CuResult (*graphInstantiate)(CuGraphExec*, CuGraph, unsigned long long);
    CuResult (*graphLaunch)(CuGraphExec, CuStream);
    CuResult (*graphExecDestroy)(CuGraphExec);
    CuResult (*graphDestroy)(CuGraph);
    CuResult (*eventCreate)(CuEvent*, unsigned);
    CuResult (*eventDestroy)(CuEvent);
    CuResult (*eventRecord)(CuEvent, CuStream);
    CuResult (*eventSynchronize)(CuEvent);
    CuResult (*eventElapsedTime)(float*, CuEvent, CuEvent);

    // Only drivers of CUDA 12.4 and newer have these; null before.
    CuResult (*deviceGetDevResource)(CuDevice, DevResource*, int);
    CuResult (*smResourceSplitByCount)(DevResource*, unsigned*, DevResource const*, DevResource*, unsigned, unsigned);
    CuResult (*resourceGenerateDesc)(CuResourceDesc*, DevResource*, unsigned);
    CuResult (*greenCtxCreate)(CuGreenContext*, CuResourceDesc, CuDevice, unsigned);
    CuResult (*greenCtxDestroy)(CuGreenContext);
    CuResult (*ctxFromGreenCtx)(CuContext*, CuGreenContext);
    CuResult (*greenCtxStreamCreate)(CuStream*, CuGreenContext, unsigned, int);

    // Throws `Stop` with code 3 where there is no driver, or it lacks a function.
    static Driver const& open();

    // Throws `CudaError` unless the call succeeded.
    static void check(CuResult result, char const* call);
};

}  // namespace selftest
