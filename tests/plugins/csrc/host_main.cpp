// Drives the plugin through good and bad calls under the sanitizers. Linked with the plugin's own objects; the driver is
// the test double, found as libcuda.so.1. Exits non-zero after printing each failed check.
#include "host.h"
#include "inflate.h"
#include "operator.h"
#include "tables.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>

extern "C" void setLoggerFinder(ILoggerFinder* finder);
extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

int gFailures = 0;
HostLogger gLogger;
IPluginCreatorV3One* gCreator = nullptr;

void check(bool ok, std::string const& what, int line) {
    if (!ok) {
        ++gFailures;
        std::printf("line %d: %s\n  log: %s\n", line, what.c_str(), gLogger.lines.c_str());
    }
}
#define CHECK(condition) check((condition), #condition, __LINE__)
#define CHECK_TEXT(condition, text) check((condition), std::string(#condition) + " " + (text), __LINE__)

bool logged(std::string const& text) { return gLogger.lines.find(text) != std::string::npos; }

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

Plugin create(Fields const& fields, TensorRTPhase phase = TensorRTPhase::kBUILD) {
    gLogger.lines.clear();
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return Plugin(gCreator->createPlugin("layer", &collection, phase));
}

int32_t const kOne = 1;
int32_t const kTwo = 2;
int32_t const kZero = 0;
int32_t const kWidth = 40;
int32_t const kLoad[] = {500000, 300000, 200000, 0};
PluginField const kGelu{"activation", "gelu", PluginFieldType::kCHAR, 4};
PluginField const kTopOne{"top_k", &kOne, PluginFieldType::kINT32, 1};
PluginField const kMaxWidth{"max_width", &kWidth, PluginFieldType::kINT32, 1};
PluginField const kLoads{"load", kLoad, PluginFieldType::kINT32, 4};
Fields const kGood{kGelu, kTopOne, kMaxWidth, kLoads};
Case const kCase{2, {2, 9, 0, 0}, 64, 4, 100, 130, 1};

Plugin configured(Case const& c = kCase, Fields const& fields = kGood) {
    Plugin plugin = create(fields);
    auto const d = describe(c, c, c);
    if (plugin == nullptr || buildPart(plugin.get())->configurePlugin(d.data(), kInputs, d.data() + kInputs, 1) != 0) {
        return nullptr;
    }
    return plugin;
}

Plugin attach(IPluginV3* plugin) {
    gLogger.lines.clear();
    return Plugin(runtimePart(plugin)->attachToContext(nullptr));
}

void testCreatorFields() {
    CHECK(create(kGood) != nullptr);
    CHECK(create({kMaxWidth}) != nullptr);  // the rest has defaults
    CHECK(create({{"activation", "silu\0\0", PluginFieldType::kCHAR, 6}, kMaxWidth}) != nullptr);
    CHECK(create({kMaxWidth, {"load", nullptr, PluginFieldType::kINT32, 0}}) != nullptr);
    CHECK(create({kMaxWidth, {"plugin_version", "1", PluginFieldType::kCHAR, 1}}) != nullptr);
    alignas(4) char shifted[9]{};
    std::memcpy(shifted + 1, &kWidth, 4);
    CHECK(create({{"max_width", shifted + 1, PluginFieldType::kINT32, 1}}) != nullptr);

    int32_t const negative[] = {-1, 2};
    int32_t const zeros[] = {0, 0};
    struct Bad {
        Fields fields;
        char const* reason;
    };
    for (Bad const& bad : std::vector<Bad>{
             {{kGelu, kTopOne}, "max_width is missing"},
             {{{"max_width", "40", PluginFieldType::kCHAR, 2}}, "max_width must be one int32"},
             {{{"max_width", negative, PluginFieldType::kINT32, 2}}, "max_width must be one int32"},
             {{{"max_width", nullptr, PluginFieldType::kINT32, 1}}, "max_width must be one int32"},
             {{{"max_width", &kZero, PluginFieldType::kINT32, 1}}, "max_width must be at least 1"},
             {{kMaxWidth, {"top_k", &kZero, PluginFieldType::kINT32, 1}}, "top_k must be at least 1"},
             {{kMaxWidth, {"top_k", &kOne, PluginFieldType::kFLOAT32, 1}}, "top_k must be one int32"},
             {{kMaxWidth, {"activation", "swish", PluginFieldType::kCHAR, 5}}, "came \"swish\""},
             {{kMaxWidth, {"activation", &kOne, PluginFieldType::kINT32, 1}}, "activation must be a string"},
             {{kMaxWidth, {"activation", nullptr, PluginFieldType::kCHAR, 4}}, "activation must be a string"},
             {{kMaxWidth, {"activation", "gelu", PluginFieldType::kCHAR, -1}}, "activation must be a string"},
             {{kMaxWidth, {"load", negative, PluginFieldType::kINT32, 2}}, "load must not be negative"},
             {{kMaxWidth, {"load", zeros, PluginFieldType::kINT32, 2}}, "load must not be all zero"},
             {{kMaxWidth, {"load", nullptr, PluginFieldType::kINT32, 2}}, "load must be a list"},
             {{kMaxWidth, {"load", kLoad, PluginFieldType::kINT32, -4}}, "load must be a list"},
             {{kMaxWidth, {"load", kLoad, PluginFieldType::kFLOAT32, 4}}, "load must be a list"},
         }) {
        CHECK_TEXT(create(bad.fields) == nullptr, bad.reason);
        CHECK_TEXT(logged(bad.reason), bad.reason);
    }
    CHECK(gCreator->createPlugin("layer", nullptr, TensorRTPhase::kBUILD) == nullptr);
    PluginFieldCollection const hollow{3, nullptr};
    CHECK(gCreator->createPlugin(nullptr, &hollow, TensorRTPhase::kBUILD) == nullptr);
    PluginFieldCollection const minus{-1, kGood.data()};
    CHECK(gCreator->createPlugin("layer", &minus, TensorRTPhase::kBUILD) == nullptr);
}

void testFormats() {
    Plugin const plugin = create(kGood);
    for (int32_t token = 0; token < 10; ++token) {
        bool const isToken = token == 0 || token == 1 || token == 7;  // float32, float16, bfloat16
        for (int32_t pos = 0; pos < kTensors; ++pos) {
            for (int32_t type = 0; type < 10; ++type) {
                for (int32_t format = 0; format < 12; ++format) {
                    Case c = kCase;
                    c.type = token;
                    auto d = describe(c, c, c);
                    d[static_cast<size_t>(pos)].desc.type = static_cast<DataType>(type);
                    d[static_cast<size_t>(pos)].desc.format = static_cast<TensorFormat>(format);
                    bool const right = pos == 0 ? type == 0 || type == 1 || type == 7
                        : pos == 2              ? type == 0
                        : pos == 7 || pos == 8  ? type == 3
                                                : type == token;
                    bool const got = buildPart(plugin.get())->supportsFormatCombination(pos, d.data(), kInputs, 1);
                    if (isToken || pos == 0) {
                        CHECK(got == (right && format == 0));
                    }
                }
            }
        }
    }
    auto const d = describe(kCase, kCase, kCase);
    CHECK(!buildPart(plugin.get())->supportsFormatCombination(-1, d.data(), kInputs, 1));
    CHECK(!buildPart(plugin.get())->supportsFormatCombination(10, d.data(), kInputs, 1));
    CHECK(!buildPart(plugin.get())->supportsFormatCombination(0, d.data(), 8, 1));
}

void testBadShapes() {
    struct Bad {
        size_t tensor;
        std::vector<int64_t> shape;
    };
    for (Bad const& bad : std::vector<Bad>{{0, {64}}, {0, {}}, {0, {2, 9, 65}}, {0, {2, 9, -1}}, {1, {4, 63}}, {1, {0, 64}},
             {1, {4}}, {2, {5}}, {2, {4, 1}}, {3, {-1, 64}}, {3, {39, 64}}, {4, {99}}, {5, {64, 100}}, {6, {4, 65}}, {7, {-1}},
             {7, {0}}, {7, {1, 130}}, {8, {4}}, {0, {1 << 30, 4, 64}}}) {
        Plugin const plugin = create(kGood);
        auto d = describe(kCase, kCase, kCase);
        d[bad.tensor].desc.dims = d[bad.tensor].min = d[bad.tensor].opt = d[bad.tensor].max = dims(bad.shape);
        CHECK(buildPart(plugin.get())->configurePlugin(d.data(), kInputs, d.data() + kInputs, 1) != 0);
        CHECK(logged("ERROR [moee] MoeeFfn configurePlugin"));
        CHECK(buildPart(plugin.get())->getWorkspaceSize(d.data(), kInputs, d.data() + kInputs, 1) == 0);
        CHECK(buildPart(plugin.get())->getNbTactics() == 0);
        std::array<PluginTensorDesc, kTensors> runtime = describe(kCase);
        runtime[bad.tensor].dims = dims(bad.shape);
        CHECK(runtimePart(plugin.get())->onShapeChange(runtime.data(), kInputs, runtime.data() + kInputs, 1) != 0);
    }
    CHECK(configured(kCase, {kMaxWidth, {"load", kLoad, PluginFieldType::kINT32, 3}}) == nullptr);  // four experts
    int32_t const five = 5;
    CHECK(configured(kCase, {kMaxWidth, {"top_k", &five, PluginFieldType::kINT32, 1}}) == nullptr);
    Plugin const plugin = create(kGood);
    CHECK(buildPart(plugin.get())->configurePlugin(describe(kCase, kCase, kCase).data(), 8, nullptr, 1) != 0);
}

void testCloneAndSerialise(Fake const& fake) {
    fake.reset();
    Plugin plugin = configured();
    Plugin copy(plugin->clone());
    std::string const id = buildPart(plugin.get())->getTimingCacheID();
    plugin.reset();
    CHECK(buildPart(copy.get())->getTimingCacheID() == id);
    CHECK(id.find(moee::tables().sourceHash) != std::string::npos);
    Plugin other = configured(kCase, {kGelu, kMaxWidth});
    CHECK(buildPart(other.get())->getTimingCacheID() != id);  // no load
    CHECK(copy->getCapabilityInterface(PluginCapabilityType::kCORE) != nullptr);
    CHECK(copy->getCapabilityInterface(static_cast<PluginCapabilityType>(9)) == nullptr);

    Plugin again(recreate(gCreator, copy.get()));
    CHECK(again != nullptr);
    Plugin attached = attach(again.get());
    CHECK(attached != nullptr);

    // Each serialised field missing, of another type, or out of range.
    PluginFieldCollection const* const fields = runtimePart(copy.get())->getFieldsToSerialize();
    Fields const all(fields->fields, fields->fields + fields->nbFields);
    int32_t const wrong = -7;
    for (size_t i = 0; i < all.size(); ++i) {
        bool const optional = std::strcmp(all[i].name, "activation") == 0 || std::strcmp(all[i].name, "top_k") == 0
            || std::strcmp(all[i].name, "kernels") == 0;
        Fields fewer = all;
        fewer.erase(fewer.begin() + static_cast<std::ptrdiff_t>(i));
        CHECK_TEXT((create(fewer, TensorRTPhase::kRUNTIME) != nullptr) == optional, all[i].name);
        if (all[i].type == PluginFieldType::kINT32) {
            Fields corrupt = all;
            corrupt[i].data = &wrong;
            CHECK_TEXT(create(corrupt, TensorRTPhase::kRUNTIME) == nullptr, all[i].name);
            corrupt[i].type = PluginFieldType::kFLOAT32;
            CHECK_TEXT(create(corrupt, TensorRTPhase::kRUNTIME) == nullptr, all[i].name);
        }
    }
    CHECK(create(kGood, TensorRTPhase::kRUNTIME) == nullptr);
    CHECK(logged("missing or corrupt"));
    Fields foreign = all;
    foreign.back() = {"kernels", "other", PluginFieldType::kCHAR, 5};
    CHECK(create(foreign, TensorRTPhase::kRUNTIME) != nullptr);
    CHECK(logged("WARNING [moee] the engine was tuned with other kernels"));
}

// Buffers of exactly the size that the contract gives, so that the sanitizer sees any access beyond.
struct Buffers {
    explicit Buffers(Case const& c, size_t workspaceBytes) {
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

int enqueue(IPluginV3* plugin, Case const& c, Buffers const& b) {
    auto const d = describe(c);
    void* const outputs[] = {b.memory[9]};
    return runtimePart(plugin)->enqueue(
        d.data(), d.data() + kInputs, b.memory.data(), outputs, b.memory[10], nullptr);
}

size_t workspaceOf(IPluginV3* plugin, Case const& c) {
    auto const d = describe(c, c, c);
    return buildPart(plugin)->getWorkspaceSize(d.data(), kInputs, d.data() + kInputs, 1);
}

// Writes the whole extent of every workspace buffer that a launch names.
int touch(char const* symbol, unsigned const*, unsigned, unsigned, void** args) {
    moee::Tables const& t = moee::tables();
    for (int32_t i = 0; i < t.kernelCount; ++i) {
        moee::Kernel const& kernel = t.kernels[i];
        if (std::strcmp(kernel.symbol, symbol) != 0) {
            continue;
        }
        std::map<moee::Arg, int64_t> scalars;
        for (int32_t a = 0; a < kernel.argCount; ++a) {
            if (kernel.args[a] > moee::Arg::kScratch) {
                scalars[kernel.args[a]] = *static_cast<int32_t*>(args[a]);
            }
        }
        for (int32_t a = 0; a < kernel.argCount; ++a) {
            auto* const at = kernel.args[a] <= moee::Arg::kScratch ? *static_cast<unsigned char**>(args[a]) : nullptr;
            int64_t const tokens = 18;  // of kCase
            int64_t const experts = 4;
            int64_t bytes = 0;
            switch (kernel.args[a]) {
            case moee::Arg::kCounts: bytes = experts * 4; break;
            case moee::Arg::kBuckets: bytes = experts * tokens * 4; break;
            case moee::Arg::kRoutes: bytes = tokens * 4; break;
            case moee::Arg::kMember: bytes = experts * 100; break;
            case moee::Arg::kHidden: bytes = tokens * (std::strncmp(kernel.role, "masked", 6) == 0 ? 112 : 48) * 2; break;
            case moee::Arg::kY: bytes = tokens * 64 * 2; break;
            default: break;
            }
            if (at != nullptr) {
                std::memset(at, 0x5A, static_cast<size_t>(bytes));
            }
        }
        return 0;
    }
    return 1;
}

void testEnqueue(Fake const& fake) {
    fake.reset();
    Plugin const plugin = configured();
    size_t const bytes = workspaceOf(plugin.get(), kCase);
    CHECK(bytes > 0);
    Buffers const buffers(kCase, bytes);
    CHECK(enqueue(plugin.get(), kCase, buffers) != 0);
    CHECK(logged("no kernels are loaded"));
    Plugin const runtime(recreate(gCreator, plugin.get()));
    Plugin const attached = attach(runtime.get());
    CHECK(attached != nullptr);
    fake.executor(&touch);
    IPluginV3OneRuntime* const run = runtimePart(attached.get());
    int32_t ids[64];
    int32_t const count = buildPart(plugin.get())->getNbTactics();
    CHECK(count > 4 && buildPart(plugin.get())->getValidTactics(ids, count) == 0);
    CHECK(buildPart(plugin.get())->getValidTactics(ids, count + 1) != 0);
    fake.capture(1);
    for (int32_t i = -1; i < count; ++i) {  // -1: the default, tactic 0
        CHECK(run->setTactic(i < 0 ? 0 : ids[i]) == 0);
        fake.clearLog();
        CHECK(enqueue(attached.get(), kCase, buffers) == 0);
        std::string const calls = fake.log();
        CHECK(calls.find("FORBIDDEN") == std::string::npos);
        size_t launches = 0;
        for (size_t at = calls.find("cuLaunchKernel"); at != std::string::npos; at = calls.find("cuLaunchKernel", at + 1)) {
            ++launches;
        }
        CHECK(launches >= 2 && launches <= 3);
    }
    fake.capture(0);
    CHECK(run->setTactic(9999) != 0);
    CHECK(logged("no tactic 9999"));
    CHECK(run->setTactic(-1) != 0);

    Case empty = kCase;
    empty.lead[0] = 0;
    fake.clearLog();
    CHECK(enqueue(attached.get(), empty, buffers) == 0);
    CHECK(fake.log().empty());
    Case other = kCase;
    other.type = 0;
    CHECK(enqueue(attached.get(), other, buffers) != 0);  // kernels were loaded for float16
    auto const d = describe(kCase);
    std::vector<void*> bad = buffers.memory;
    void* const outputs[] = {buffers.memory[9]};
    bad[3] = static_cast<char*>(bad[3]) + 2;
    CHECK(run->enqueue(d.data(), d.data() + kInputs, bad.data(), outputs, buffers.memory[10], nullptr) != 0);
    CHECK(logged("not aligned to 16 bytes"));
    CHECK(run->enqueue(d.data(), d.data() + kInputs, buffers.memory.data(), outputs, nullptr, nullptr) != 0);
}

void testDevices(Fake const& fake) {
    struct Device {
        int major, minor;
        char const* module;  // kind and SM of what must be loaded last; null: attach must fail
    };
    // The tables of this test hold sm_80, sm_87 and the PTX of sm_80.
    for (Device const& device : {Device{8, 0, "cubin sm=80"}, Device{8, 7, "cubin sm=87"}, Device{8, 6, "cubin sm=80"},
             Device{8, 9, "cubin sm=80"}, Device{9, 0, "ptx sm=80"}, Device{12, 0, "ptx sm=80"}, Device{7, 5, nullptr}}) {
        fake.reset();
        fake.device(device.major, device.minor);
        Plugin const built = configured();
        if (device.module == nullptr) {
            CHECK(built == nullptr);  // the builder would otherwise fail later, with less to say
            fake.device(8, 7);
            Plugin const elsewhere = configured();
            fake.device(device.major, device.minor);
            Plugin const runtime(recreate(gCreator, elsewhere.get()));
            CHECK(attach(runtime.get()) == nullptr);
            CHECK(logged("no float16 kernels for sm_75 (it was built for 80, 87)"));
            continue;
        }
        fake.clearLog();
        Plugin const runtime(recreate(gCreator, built.get()));
        CHECK(attach(runtime.get()) != nullptr);
        CHECK_TEXT(fake.log().find(device.module) != std::string::npos, device.module);
    }
    // A cubin that this driver refuses gives way to PTX; any other error does not.
    fake.reset();
    Plugin const orin = configured();
    fake.fail("cuModuleLoadDataEx", 0, 209);
    CHECK(attach(orin.get()) != nullptr);
    CHECK(fake.log().find("cuModuleLoadDataEx ptx sm=80 route_load_buckets_float16") != std::string::npos);
    fake.reset();
    Plugin const built = configured();
    fake.context(0);
    Plugin const runtime(recreate(gCreator, built.get()));
    CHECK(attach(runtime.get()) == nullptr);
    CHECK(logged("no CUDA context"));
}

void testInjectedErrors(Fake const& fake) {
    fake.reset();
    Plugin const built = configured();
    Plugin const runtime(recreate(gCreator, built.get()));
    CHECK(fake.liveModules() == 0 && fake.liveMemory() == 0);
    for (char const* call : {"cuCtxGetCurrent", "cuCtxGetDevice", "cuDeviceGetAttribute", "cuModuleLoadDataEx",
             "cuModuleGetFunction", "cuFuncSetAttribute", "cuMemAlloc_v2", "cuMemcpyHtoD_v2"}) {
        // The build-phase object routes by load, hence allocates; errors late in the sequence must clean up too.
        for (int32_t after : {0, 1, 5}) {
            bool const once = std::strcmp(call, "cuModuleLoadDataEx") != 0 && std::strcmp(call, "cuModuleGetFunction") != 0
                && std::strcmp(call, "cuFuncSetAttribute") != 0;
            bool const twice = std::strcmp(call, "cuDeviceGetAttribute") == 0;
            fake.reset();
            fake.fail(call, after, 2);
            Plugin const attached = attach(built.get());
            bool const reached = !once || after == 0 || (twice && after == 1);
            CHECK_TEXT((attached == nullptr) == reached, std::string(call) + " " + std::to_string(after));
            if (reached) {
                CHECK_TEXT(logged("ERROR [moee] MoeeFfn attachToContext") && logged("CUDA_ERROR_OUT_OF_MEMORY")
                        && logged(std::string(call).substr(0, std::string(call).find('_'))),
                    call);
                CHECK_TEXT(fake.liveModules() == 0 && fake.liveMemory() == 0, call);
            }
        }
    }
    fake.reset();
    size_t const bytes = workspaceOf(built.get(), kCase);
    Buffers const buffers(kCase, bytes);
    {
        Plugin const attached = attach(runtime.get());
        for (auto const& [call, calls] : std::map<std::string, int>{{"cuMemsetD32Async", 1}, {"cuLaunchKernel", 3}}) {
            for (int after = 0; after < calls; ++after) {
                gLogger.lines.clear();
                fake.fail(call.c_str(), after, 719);
                CHECK_TEXT(runtimePart(attached.get())->setTactic(1) == 0, call);
                CHECK_TEXT(enqueue(attached.get(), kCase, buffers) != 0, call);
                CHECK_TEXT(logged("ERROR [moee] MoeeFfn enqueue: " + call), call);
            }
        }
        fake.fail("none", 0, 0);
        CHECK(enqueue(attached.get(), kCase, buffers) == 0);  // an error does not stick
        CHECK(fake.liveModules() > 0);
        Plugin const second = attach(runtime.get());  // shares the modules
        int const live = fake.liveModules();
        CHECK(second != nullptr && fake.liveModules() == live);
    }
    CHECK(fake.liveModules() == 0);
}

// The builder may time without attaching.
void testBuilderTiming(Fake const& fake) {
    fake.reset();
    Plugin const built = configured();
    auto const d = describe(kCase);
    CHECK(runtimePart(built.get())->onShapeChange(d.data(), kInputs, d.data() + kInputs, 1) == 0);
    Buffers const buffers(kCase, workspaceOf(built.get(), kCase));
    fake.clearLog();
    fake.capture(1);
    CHECK(enqueue(built.get(), kCase, buffers) == 0);
    CHECK(fake.log().find("route_load") != std::string::npos);
    CHECK(fake.log().find("FORBIDDEN") == std::string::npos);
    fake.capture(0);
}

void testInflate() {
    moee::Tables const& t = moee::tables();
    std::vector<unsigned char> out;
    std::string why;
    std::mt19937 random(1);
    for (int32_t i = 0; i < t.kernelCount; ++i) {
        moee::Kernel const& k = t.kernels[i];
        moee::Embedded const& e = moee::embedded(k.module);
        CHECK(e.deflated && moee::inflateRaw(e.data, e.packedBytes, e.bytes, out, why));
        CHECK(moee::adler32(out.data(), out.size()) == e.adler32);
        CHECK(!moee::inflateRaw(e.data, e.packedBytes, e.bytes - 1, out, why));
        CHECK(!moee::inflateRaw(e.data, e.packedBytes, e.bytes + 1, out, why));
        if (i % 16 != 0) {
            continue;
        }
        for (int32_t round = 0; round < 200; ++round) {  // corrupt or cut short: an error or other bytes, never a crash
            std::vector<unsigned char> packed(e.data, e.data + e.packedBytes);
            packed[random() % packed.size()] ^= static_cast<unsigned char>(1U << (random() % 8));
            packed.resize(round % 2 == 0 ? packed.size() : random() % packed.size());
            packed.shrink_to_fit();
            if (!moee::inflateRaw(packed.data(), packed.size(), e.bytes, out, why)) {
                CHECK(!why.empty());
            }
        }
    }
}

void testWithoutDriver() {
    Plugin const built = configured();
    CHECK(built != nullptr);
    CHECK(workspaceOf(built.get(), kCase) > 0);
    CHECK(buildPart(built.get())->getNbTactics() > 0);
    auto const d = describe(kCase);
    CHECK(runtimePart(built.get())->onShapeChange(d.data(), kInputs, d.data() + kInputs, 1) == 0);
    Plugin const runtime(recreate(gCreator, built.get()));
    CHECK(attach(runtime.get()) == nullptr);
    CHECK(logged("no CUDA driver"));
}

}  // namespace

int main(int argc, char** argv) {
    setLoggerFinder(&gLogger);
    int32_t count = 0;
    gCreator = static_cast<IPluginCreatorV3One*>(getCreators(count)[0]);
    CHECK(count == 1);
    if (argc > 1 && std::strcmp(argv[1], "without-driver") == 0) {
        testWithoutDriver();
    } else {
        Fake const fake;
        if (fake.library == nullptr || dlsym(fake.library, "fake_reset") == nullptr) {
            std::printf("the test double is not on the library path\n");
            return 2;
        }
        testCreatorFields();
        testFormats();
        testBadShapes();
        testCloneAndSerialise(fake);
        testEnqueue(fake);
        testDevices(fake);
        testInjectedErrors(fake);
        testBuilderTiming(fake);
        testInflate();
    }
    std::printf("%d checks failed\n", gFailures);
    return gFailures == 0 ? 0 : 1;
}
