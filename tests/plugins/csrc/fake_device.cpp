// The rest of the driver's calls for the self-test, on a device that runs: streams are queues that advance in turns, graphs are
// recorded queues, green contexts are the same device. Faults are planted by name, with the variable MOEE_FAKE_FAULT.
#include "fake_device.h"
#include "fake_kernels.h"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <set>
#include <vector>

namespace {

using Work = std::function<void()>;
struct Step {
    Work work;
    bool isUp;    // what a missing barrier lets the next kernel overtake
    bool isZero;  // the counters' memset
};
struct Stream {
    std::deque<Step> queue;
    bool capturing{false};
    std::vector<Step> captured;
};
struct Event {
    std::chrono::steady_clock::time_point time;
};
using Graph = std::vector<Step>;

std::set<Stream*> gStreams;
size_t gLeaked = 0;

[[gnu::constructor]] void configure() {
    quiet();
    if (*setting("MOEE_FAKE_SM") != 0) {
        setDevice(std::atoi(setting("MOEE_FAKE_SM")));
    }
}

void put(void* handle, Step step) {
    auto* const stream = static_cast<Stream*>(handle);
    if (stream == nullptr) {  // the legacy stream waits for nobody here
        step.work();
    } else if (stream->capturing) {
        stream->captured.push_back(std::move(step));
    } else {
        stream->queue.push_back(std::move(step));
    }
}

// The next step of a queue; without a barrier, the one behind an `up` kernel goes first.
void advance(Stream& stream) {
    auto next = stream.queue.begin();
    if ((FAULT("missing_barrier") || FAULT("group_barrier")) && next->isUp && stream.queue.size() > 1) {
        ++next;
    }
    Work const work = std::move(next->work);
    stream.queue.erase(next);
    work();
}

}  // namespace

bool deviceCapturing() {
    for (Stream const* stream : gStreams) {
        if (stream->capturing) {
            return true;
        }
    }
    return false;
}

int deviceRun() {
    for (bool busy = true; busy;) {
        busy = false;
        for (Stream* stream : gStreams) {
            if (!stream->queue.empty()) {
                advance(*stream);
                busy = true;
            }
        }
    }
    return 0;
}

int deviceZero(uint64_t to, size_t bytes, void* stream) {
    if (FAULT("graph_unsafe_call") && deviceCapturing()) {
        return 900;
    }
    put(stream, {[to, bytes] { std::memset(reinterpret_cast<void*>(to), 0, bytes); }, false, true});
    return 0;
}

int deviceLaunch(std::string const& image, std::string const& symbol, unsigned const* grid, void* stream, void** args) {
    moee::Kernel const* const kernel = findKernel(image, symbol);
    if (kernel == nullptr) {
        return 98;  // CUDA_ERROR_INVALID_DEVICE_FUNCTION
    }
    std::string const role = kernel->role;
    if (!Call(*kernel, grid, args).hasNoScratch()) {
        return 1;
    }
    if (FAULT("launch_failure") && role == "masked_down") {
        return 719;
    }
    bool const isUp = role == "group_up" || (!FAULT("group_barrier") && (role == "expert_up" || role == "masked_up"));
    put(stream, {[call = Call(*kernel, grid, args)] { call.run(); }, isUp, false});
    return 0;
}

extern "C" {

int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
int cuDeviceGet(int* device, int) { *device = 0; return 0; }
int cuDeviceGetName(char* name, int length, int) {
    std::snprintf(name, static_cast<size_t>(length), "test double");
    return 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int) { *bytes = deviceMemoryBytes(); return 0; }
int cuDeviceGetPCIBusId(char* id, int length, int) {
    std::snprintf(id, static_cast<size_t>(length), "0000:01:00.0");
    return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) { *context = &gStreams; return 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuMemGetInfo_v2(size_t* free, size_t* total) {
    *total = deviceMemoryBytes();
    *free = *total - usedBytes() - gLeaked;
    return 0;
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    std::memcpy(to, reinterpret_cast<void*>(from), bytes);
    return deviceCapturing() ? 900 : 0;
}
int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
    return deviceCapturing() ? 900 : 0;
}
int cuMemsetD8_v2(uint64_t to, unsigned char value, size_t bytes) {
    std::memset(reinterpret_cast<void*>(to), value, bytes);
    return deviceCapturing() ? 900 : 0;
}
int cuStreamCreate(void** stream, unsigned) {
    auto* const made = new Stream;
    gStreams.insert(made);
    *stream = made;
    return 0;
}
int cuStreamDestroy_v2(void* stream) {
    gStreams.erase(static_cast<Stream*>(stream));
    delete static_cast<Stream*>(stream);
    gLeaked += FAULT("leak") ? kModuleBytes : 0;
    return 0;
}
int cuStreamBeginCapture_v2(void* stream, int) { static_cast<Stream*>(stream)->capturing = true; return 0; }
int cuStreamEndCapture(void* handle, void** graph) {
    auto* const stream = static_cast<Stream*>(handle);
    stream->capturing = false;
    auto* const made = new Graph;
    for (Step& step : stream->captured) {
        if (!(FAULT("stale_counter") && step.isZero)) {
            made->push_back(std::move(step));
        }
    }
    stream->captured.clear();
    *graph = made;
    return 0;
}
int cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) {
    *exec = new Graph(*static_cast<Graph*>(graph));
    return 0;
}
int cuGraphLaunch(void* exec, void* stream) {
    for (Step const& step : *static_cast<Graph*>(exec)) {
        put(stream, step);
    }
    return 0;
}
int cuGraphExecDestroy(void* exec) { delete static_cast<Graph*>(exec); return 0; }
int cuGraphDestroy(void* graph) { delete static_cast<Graph*>(graph); return 0; }
int cuEventCreate(void** event, unsigned) { *event = new Event; return 0; }
int cuEventDestroy_v2(void* event) { delete static_cast<Event*>(event); return 0; }
int cuEventRecord(void* event, void* stream) {
    put(stream, {[event] { static_cast<Event*>(event)->time = std::chrono::steady_clock::now(); }, false, false});
    return 0;
}
int cuEventSynchronize(void*) { return deviceRun(); }
int cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    *milliseconds = std::chrono::duration<float, std::milli>(static_cast<Event*>(end)->time - static_cast<Event*>(start)->time).count();
    return 0;
}

// CUdevResource: a kind, 92 bytes, then the number of multiprocessors, which comes in eights.
int cuDeviceGetDevResource(int, unsigned char* resource, int type) {
    unsigned const count = kAllMultiprocessors;
    std::memcpy(resource, &type, 4);
    std::memcpy(resource + 96, &count, 4);
    return 0;
}
int cuDevSmResourceSplitByCount(
    unsigned char* result, unsigned* groups, unsigned char const* input, unsigned char* rest, unsigned, unsigned least) {
    unsigned const count = (least + 7) / 8 * 8;
    unsigned const left = kAllMultiprocessors - count;
    std::memcpy(result, input, 144);
    std::memcpy(result + 96, &count, 4);
    std::memcpy(rest, input, 144);
    std::memcpy(rest + 96, &left, 4);
    *groups = 1;
    return 0;
}
int cuDevResourceGenerateDesc(void** description, unsigned char*, unsigned) { *description = &gStreams; return 0; }
int cuGreenCtxCreate(void** context, void*, int, unsigned flags) { *context = &gStreams; return flags == 1 ? 0 : 1; }
int cuGreenCtxDestroy(void*) { return 0; }
int cuCtxFromGreenCtx(void** context, void* green) { *context = green; return 0; }
int cuGreenCtxStreamCreate(void** stream, void*, unsigned flags, int) { return flags == 1 ? cuStreamCreate(stream, flags) : 1; }

// What a library that enqueues kernels of its own needs.
void fake_enqueue(void* stream, void (*work)(void*), void* data) { put(stream, {[work, data] { work(data); }, false, false}); }

}  // extern "C"
