// A stand-in for libcuda.so.1: device memory is host memory, a launch calls back into the test, or runs where fake_device.cpp
// is linked in. It records every call, refuses what a stream capture forbids, and fails on demand.
#include "fake_device.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>

namespace {

constexpr int kInvalidValue = 1;
constexpr int kOutOfMemory = 2;
constexpr int kInvalidImage = 200;
constexpr int kInvalidContext = 201;
constexpr int kNoBinary = 209;
constexpr int kNotFound = 500;
constexpr int kCaptureUnsupported = 900;

struct Module {
    std::string symbol;      // of a made-up module
    std::string content;     // copy of the image
    bool isElf;
};
struct Function {
    Module* module;
    std::string symbol;
    int sharedLimit;
};
using Executor = int (*)(char const* symbol, unsigned const* grid, unsigned threads, unsigned shared, void** args);

struct State {
    int major{8}, minor{7};
    bool hasContext{true};
    bool capturing{false};
    bool quiet{false};
    std::string failing;
    int failAfter{0};
    int failResult{0};
    Executor executor{nullptr};
    std::string log;
    std::set<Module*> modules;
    std::set<Function*> functions;
    std::map<uint64_t, size_t> memory;
};
State gState;
int gContext;

void record(std::string const& line) {
    if (!gState.quiet) {
        gState.log += line + "\n";
    }
}

// Common entry of each call: logs it, applies the injected error and the capture rules.
int enter(char const* name, std::string const& detail = "", bool forbiddenInCapture = false) {
    record(std::string(name) + (detail.empty() ? "" : " " + detail));
    if (forbiddenInCapture && (gState.capturing || (deviceCapturing != nullptr && deviceCapturing()))) {
        record(std::string("FORBIDDEN ") + name);
        return kCaptureUnsupported;
    }
    if (gState.failing == name && gState.failAfter-- == 0) {
        return gState.failResult;
    }
    return 0;
}

uint64_t read(unsigned char const* at, int bytes) {
    uint64_t value = 0;
    std::memcpy(&value, at, static_cast<size_t>(bytes));
    return value;
}

// End of the last section or table of a 64-bit ELF file.
size_t elfBytes(unsigned char const* elf) {
    uint64_t const sections = read(elf + 40, 8);
    uint64_t const count = read(elf + 60, 2);
    uint64_t end = sections + count * 64;
    uint64_t const programEnd = read(elf + 32, 8) + read(elf + 56, 2) * 56;
    end = programEnd > end ? programEnd : end;
    for (uint64_t i = 0; i < count; ++i) {
        unsigned char const* const header = elf + sections + i * 64;
        bool const empty = read(header + 4, 4) == 8;  // SHT_NOBITS
        uint64_t const last = read(header + 24, 8) + (empty ? 0 : read(header + 32, 8));
        end = last > end ? last : end;
    }
    return end;
}

bool elfHasSymbol(Module const& module, char const* symbol) {
    return module.content.find(std::string(symbol) + '\0') != std::string::npos;
}

}  // namespace

size_t usedBytes() {
    size_t sum = gState.modules.size() * kModuleBytes;
    for (auto const& [address, bytes] : gState.memory) {
        sum += bytes;
    }
    return sum;
}
void setDevice(int sm) {
    gState.major = sm / 10;
    gState.minor = sm % 10;
}
void quiet() { gState.quiet = true; }

extern "C" {

// Control, for tests.
void fake_reset() {
    for (auto const& [address, bytes] : gState.memory) {
        std::free(reinterpret_cast<void*>(address));
    }
    State fresh;
    fresh.modules = std::move(gState.modules);
    fresh.functions = std::move(gState.functions);
    gState = std::move(fresh);
}
void fake_device(int major, int minor) { gState.major = major; gState.minor = minor; }
void fake_context(int present) { gState.hasContext = present != 0; }
void fake_capture(int on) { gState.capturing = on != 0; }
void fake_fail(char const* call, int after, int result) {
    gState.failing = call;
    gState.failAfter = after;
    gState.failResult = result;
}
void fake_executor(Executor executor) { gState.executor = executor; }
char const* fake_log() { return gState.log.c_str(); }
void fake_clear_log() { gState.log.clear(); }
int fake_live_modules() { return static_cast<int>(gState.modules.size()); }
int fake_live_memory() { return static_cast<int>(gState.memory.size()); }

// The driver API that the plugin uses.
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { *count = deviceCount(); return 0; }
int cuGetErrorName(int error, char const** text) {
    *text = error == kNoBinary ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : error == kCaptureUnsupported
            ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" : error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_UNKNOWN";
    return 0;
}
int cuGetErrorString(int, char const** text) { *text = "test double"; return 0; }
int cuCtxGetCurrent(void** context) {
    int const error = enter("cuCtxGetCurrent");
    *context = gState.hasContext ? &gContext : nullptr;
    return error;
}
int cuCtxPushCurrent_v2(void*) { return enter("cuCtxPushCurrent_v2"); }
int cuCtxPopCurrent_v2(void** context) { *context = &gContext; return enter("cuCtxPopCurrent_v2"); }
int cuCtxGetDevice(int* device) { *device = 0; return enter("cuCtxGetDevice"); }
int cuCtxSynchronize() {
    int const error = enter("cuCtxSynchronize", "", true);
    return error == 0 && deviceRun != nullptr ? deviceRun() : error;
}
int cuStreamSynchronize(void*) {
    int const error = enter("cuStreamSynchronize", "", true);
    return error == 0 && deviceRun != nullptr ? deviceRun() : error;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 75 ? gState.major : attribute == 76 ? gState.minor : attribute == 16 ? kAllMultiprocessors
        : attribute == 38            ? kL2Bytes
                                     : 0;
    return enter("cuDeviceGetAttribute", std::to_string(attribute));
}

int cuModuleLoadDataEx(void** out, void const* image, unsigned, int*, void**) {
    auto const* const text = static_cast<char const*>(image);
    int const sm = gState.major * 10 + gState.minor;
    int built = 0;
    char symbol[256] = "";
    bool const ptx = std::sscanf(text, "// MOEE-FAKE ptx=%d symbol=%255s", &built, symbol) == 2;
    bool const cubin = !ptx && std::sscanf(text, "MOEE-FAKE sm=%d symbol=%255s", &built, symbol) == 2;
    bool const elf = std::memcmp(text, "\x7f" "ELF", 4) == 0;
    int const error = enter("cuModuleLoadDataEx",
        std::string(ptx ? "ptx" : cubin ? "cubin" : elf ? "elf" : "unknown") + " sm=" + std::to_string(built) + " " + symbol, true);
    if (error != 0) {
        return error;
    }
    if (!ptx && !cubin && !elf) {
        return kInvalidImage;
    }
    if (FAULT("refuses_cubins") && (cubin || elf)) {
        return kNoBinary;  // as a driver that is older than the compiler
    }
    if ((cubin && (built / 10 != sm / 10 || built > sm)) || (ptx && built > sm)) {
        return kNoBinary;
    }
    // Reads to the end: finds a module that was cut short.
    size_t const bytes = elf ? elfBytes(static_cast<unsigned char const*>(image)) : std::strlen(text);
    auto* const module = new Module{symbol, std::string(text, bytes), elf};
    gState.modules.insert(module);
    *out = module;
    return 0;
}
int cuModuleGetFunction(void** out, void* handle, char const* symbol) {
    int const error = enter("cuModuleGetFunction", symbol);
    auto* const module = static_cast<Module*>(handle);
    if (error != 0 || gState.modules.count(module) == 0) {
        return error != 0 ? error : kInvalidValue;
    }
    if (module->isElf ? !elfHasSymbol(*module, symbol) : module->symbol != symbol) {
        return kNotFound;
    }
    auto* const function = new Function{module, symbol, 49152};
    gState.functions.insert(function);
    *out = function;
    return 0;
}
int cuModuleUnload(void* handle) {
    int const error = enter("cuModuleUnload", "", true);
    auto* const module = static_cast<Module*>(handle);
    if (gState.modules.erase(module) == 0) {
        return kInvalidValue;
    }
    for (auto it = gState.functions.begin(); it != gState.functions.end();) {
        if ((*it)->module == module) {
            delete *it;
            it = gState.functions.erase(it);
        } else {
            ++it;
        }
    }
    delete module;
    return error;
}
int cuFuncSetAttribute(void* handle, int attribute, int value) {
    int const error = enter("cuFuncSetAttribute", std::to_string(attribute) + "=" + std::to_string(value), true);
    if (error != 0 || value > 232448) {
        return error != 0 ? error : kInvalidValue;
    }
    static_cast<Function*>(handle)->sharedLimit = value;
    return 0;
}

int cuMemAlloc_v2(uint64_t* out, size_t bytes) {
    int const error = enter("cuMemAlloc_v2", std::to_string(bytes), true);
    if (error != 0) {
        return error;
    }
    if (usedBytes() + bytes > deviceMemoryBytes()) {
        return kOutOfMemory;
    }
    void* const memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(memory, 0xFF, bytes);
    *out = reinterpret_cast<uint64_t>(memory);
    gState.memory[*out] = bytes;
    return 0;
}
int cuMemFree_v2(uint64_t address) {
    int const error = enter("cuMemFree_v2", "", true);
    if (gState.memory.erase(address) == 0) {
        return kInvalidValue;
    }
    std::free(reinterpret_cast<void*>(address));
    return error;
}
int cuMemcpyHtoD_v2(uint64_t to, void const* from, size_t bytes) {
    int const error = enter("cuMemcpyHtoD_v2", std::to_string(bytes), true);
    if (error == 0) {
        std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    }
    return error;
}
int cuMemsetD32Async(uint64_t to, unsigned value, size_t count, void* stream) {
    int const error = enter("cuMemsetD32Async", std::to_string(value) + " count=" + std::to_string(count));
    if (error != 0 || value != 0) {
        return error != 0 ? error : kInvalidValue;
    }
    if (deviceZero != nullptr) {
        return deviceZero(to, count * 4, stream);
    }
    std::memset(reinterpret_cast<void*>(to), 0, count * 4);  // memset: the sanitizer checks its range
    return 0;
}
int cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
    void* stream, void** args, void** extra) {
    auto* const function = static_cast<Function*>(handle);
    if (gState.functions.count(function) == 0) {
        record("cuLaunchKernel of an unloaded function");
        return kInvalidContext;
    }
    int const error = enter("cuLaunchKernel", function->symbol + " grid=" + std::to_string(gx) + "," + std::to_string(gy)
            + "," + std::to_string(gz) + " threads=" + std::to_string(bx) + " shared=" + std::to_string(shared));
    if (error != 0) {
        return error;
    }
    if (bx * by * bz > 1024 || by != 1 || bz != 1 || gx < 1 || gy < 1 || gz < 1 || gy > 65535 || gz > 65535
        || static_cast<int>(shared) > function->sharedLimit || extra != nullptr) {
        return kInvalidValue;
    }
    unsigned const grid[3] = {gx, gy, gz};
    if (deviceLaunch != nullptr) {
        return deviceLaunch(function->module->content, function->symbol, grid, stream, args);
    }
    return gState.executor != nullptr ? gState.executor(function->symbol.c_str(), grid, bx, shared, args) : 0;
}

}  // extern "C"
