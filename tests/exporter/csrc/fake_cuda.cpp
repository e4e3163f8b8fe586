// A stand-in for libcuda.so.1 for the bundle's runner: device memory is host memory. It counts what was not freed.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>

namespace {
std::set<uint64_t> gAllocated;
int gStream = 0;

struct AtExit {
    ~AtExit() {
        if (!gAllocated.empty()) {
            std::fprintf(stderr, "fake driver: %zu allocations were not freed\n", gAllocated.size());
            std::_Exit(99);
        }
    }
} gAtExit;
}  // namespace

extern "C" {
int cuGetErrorName(int, char const** name) {
    *name = "CUDA_ERROR_FAKE";
    return 0;
}
int cuInit(unsigned) { return std::getenv("FAKE_NO_DEVICE") != nullptr ? 100 : 0; }
int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? 0 : 101;
}
int cuDeviceGetName(char* name, int size, int) {
    std::strncpy(name, "Fake GPU", static_cast<size_t>(size));
    return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
    *context = &gStream;
    return 0;
}
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuStreamCreate(void** stream, unsigned) {
    *stream = &gStream;
    return 0;
}
int cuStreamDestroy_v2(void*) { return 0; }
int cuStreamSynchronize(void* stream) { return stream == &gStream ? 0 : 400; }
int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    *address = reinterpret_cast<uint64_t>(std::malloc(bytes));
    gAllocated.insert(*address);
    return 0;
}
int cuMemFree_v2(uint64_t address) {
    std::free(reinterpret_cast<void*>(address));
    return gAllocated.erase(address) == 1 ? 0 : 1;
}
int cuMemcpyHtoDAsync_v2(uint64_t device, void const* host, size_t bytes, void*) {
    std::memcpy(reinterpret_cast<void*>(device), host, bytes);
    return 0;
}
int cuMemcpyDtoHAsync_v2(void* host, uint64_t device, size_t bytes, void*) {
    std::memcpy(host, reinterpret_cast<void*>(device), bytes);
    return 0;
}
}
