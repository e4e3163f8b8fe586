// Checks, the test double's controls and a good layer, for the host program.
#pragma once

#include "plugin/host.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

inline int gFailures = 0;
inline HostLogger gLogger;
inline IPluginCreatorV3One* gCreator = nullptr;

inline void check(bool ok, std::string const& what, int line) {
    if (!ok) {
        ++gFailures;
        std::printf("line %d: %s\n  log: %s\n", line, what.c_str(), gLogger.lines.c_str());
    }
}
#define CHECK(condition) check((condition), #condition, __LINE__)
#define CHECK_TEXT(condition, text) check((condition), std::string(#condition) + " " + (text), __LINE__)

inline bool logged(std::string const& text) { return gLogger.lines.find(text) != std::string::npos; }

// Control functions of the test double.
struct Fake {
    void* library{dlopen("libcuda.so.1", RTLD_NOW)};
    template <typename F>
    F get(char const* name) const { return reinterpret_cast<F>(dlsym(library, name)); }
    void reset() const { get<void (*)()>("fake_reset")(); }
    void device(int major, int minor) const { get<void (*)(int, int)>("fake_device")(major, minor); }
    void context(int present) const { get<void (*)(int)>("fake_context")(present); }
    void capture(int on) const { get<void (*)(int)>("fake_capture")(on); }
    void fail(char const* call, int after, int result) const {
        get<void (*)(char const*, int, int)>("fake_fail")(call, after, result);
    }
    template <typename F>
    void executor(F f) const { get<void (*)(F)>("fake_executor")(f); }
    std::string log() const { return get<char const* (*)()>("fake_log")(); }
    void clearLog() const { get<void (*)()>("fake_clear_log")(); }
    int liveModules() const { return get<int (*)()>("fake_live_modules")(); }
    int liveMemory() const { return get<int (*)()>("fake_live_memory")(); }
};

using Plugin = std::unique_ptr<IPluginV3>;
using Fields = std::vector<PluginField>;

inline Plugin create(Fields const& fields, TensorRTPhase phase = TensorRTPhase::kBUILD) {
    gLogger.lines.clear();
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return Plugin(gCreator->createPlugin("layer", &collection, phase));
}

inline int32_t const kOne = 1;
inline int32_t const kTwo = 2;
inline int32_t const kZero = 0;
inline int32_t const kWidth = 40;
inline int32_t const kLoad[] = {500000, 300000, 200000, 0};
inline PluginField const kGelu{"activation", "gelu", PluginFieldType::kCHAR, 4};
inline PluginField const kTopOne{"top_k", &kOne, PluginFieldType::kINT32, 1};
inline PluginField const kMaxWidth{"max_width", &kWidth, PluginFieldType::kINT32, 1};
inline PluginField const kLoads{"load", kLoad, PluginFieldType::kINT32, 4};
inline Fields const kGood{kGelu, kTopOne, kMaxWidth, kLoads};
inline LayerShape const kCase{2, {2, 9, 0, 0}, 64, 4, 100, 130, 1};

inline Plugin configured(LayerShape const& c = kCase, Fields const& fields = kGood) {
    Plugin plugin = create(fields);
    auto const d = describe(c, c, c);
    if (plugin == nullptr || buildPart(plugin.get())->configurePlugin(d.data(), kInputs, d.data() + kInputs, 1) != 0) {
        return nullptr;
    }
    return plugin;
}

inline Plugin attach(IPluginV3* plugin) {
    gLogger.lines.clear();
    return Plugin(runtimePart(plugin)->attachToContext(nullptr));
}

// Buffers of exactly the size that the contract gives, so that the sanitizer sees any access beyond.
struct Buffers {
    explicit Buffers(LayerShape const& c, size_t workspaceBytes) {
        int64_t tokens = 1;
        for (int32_t i = 0; i < c.leadCount; ++i) {
            tokens *= c.lead[i];
        }
        size_t const t = c.type == 0 ? 4 : 2;
        auto const bytes = [](int64_t count, size_t item) { return static_cast<size_t>(count) * item; };
        for (size_t const size : {bytes(tokens * c.dim, t), bytes(c.experts * c.dim, t), bytes(c.experts, 4),
                 bytes(c.unionSize * c.dim, t), bytes(c.unionSize, t), bytes(c.unionSize * c.dim, t),
                 bytes(c.experts * c.dim, t), bytes(c.neurons, 4), bytes(c.experts + 1, 4), bytes(tokens * c.dim, t),
                 workspaceBytes}) {
            memory.push_back(std::malloc(size > 0 ? size : 1));
            sizes.push_back(size);
        }
    }
    ~Buffers() {
        for (void* m : memory) {
            std::free(m);
        }
    }
    Buffers(Buffers const&) = delete;
    Buffers& operator=(Buffers const&) = delete;
    std::vector<void*> memory;
    std::vector<size_t> sizes;
};

inline int enqueue(IPluginV3* plugin, LayerShape const& c, Buffers const& b) {
    auto const d = describe(c);
    void* const outputs[] = {b.memory[9]};
    return runtimePart(plugin)->enqueue(
        d.data(), d.data() + kInputs, b.memory.data(), outputs, b.memory[10], nullptr);
}

inline size_t workspaceOf(IPluginV3* plugin, LayerShape const& c) {
    auto const d = describe(c, c, c);
    return buildPart(plugin)->getWorkspaceSize(d.data(), kInputs, d.data() + kInputs, 1);
}

// One function a source file.
void checkCreatorAndShapes();
void checkLifeCycle(Fake const& fake);
void checkDriver(Fake const& fake);
void checkWithoutDriver();
void fuzz(Fake const& fake, uint64_t seed, uint64_t count);
