// Clone, serialise, recreate, attach, enqueue: each tactic within exactly the workspace that was asked for.
#include "host_checks.h"
#include "operator/tables.h"
#include "operator/tactics.h"
#include "tensorrt/log.h"

#include <algorithm>
#include <map>

namespace {

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

int64_t gTokens = 18;  // of the call that `touch` stands in for; kCase has 18

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
            int64_t const tokens = gTokens;
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

size_t timesIn(std::string const& calls, char const* name) {
    size_t times = 0;
    for (size_t at = calls.find(name); at != std::string::npos; at = calls.find(name, at + 1)) {
        ++times;
    }
    return times;
}

moee::Tactic const& tacticOf(int32_t id) {
    moee::Tables const& t = moee::tables();
    return *std::find_if(t.tactics, t.tactics + t.tacticCount, [id](moee::Tactic const& tactic) { return tactic.id == id; });
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
    int grouped = 0;
    for (int32_t i = -1; i < count; ++i) {  // -1: the default, tactic 0
        CHECK(run->setTactic(i < 0 ? 0 : ids[i]) == 0);
        fake.clearLog();
        CHECK(enqueue(attached.get(), kCase, buffers) == 0);
        std::string const calls = fake.log();
        CHECK(calls.find("FORBIDDEN") == std::string::npos);
        CHECK_TEXT(timesIn(calls, "cuLaunchKernel") <= 3 && timesIn(calls, "cuMemsetD32Async") <= 1, calls);
        if (i >= 0) {
            moee::Tactic const& tactic = tacticOf(ids[i]);
            bool const groups = std::strncmp(tactic.name, "group", 5) == 0;  // they clear nothing
            CHECK_TEXT(timesIn(calls, "cuMemsetD32Async") == (groups ? 0 : 1), tactic.name);
            CHECK_TEXT(!groups || timesIn(calls, "cuLaunchKernel") == static_cast<size_t>(tactic.launchCount), tactic.name);
            CHECK_TEXT(!groups || tactic.launchCount <= 2, tactic.name);
            grouped += groups ? 1 : 0;
        }
    }
    CHECK(grouped == 2);
    fake.capture(0);
    CHECK(run->setTactic(9999) != 0);
    CHECK(logged("no tactic 9999"));
    CHECK(run->setTactic(-1) != 0);

    LayerShape empty = kCase;
    empty.lead[0] = 0;
    fake.clearLog();
    CHECK(enqueue(attached.get(), empty, buffers) == 0);
    CHECK(fake.log().empty());
    LayerShape other = kCase;
    other.type = 0;
    CHECK(enqueue(attached.get(), other, buffers) != 0);  // kernels were loaded for float16
    other = kCase;
    other.dim = 48;
    CHECK(enqueue(attached.get(), other, buffers) != 0);  // and for 64 channels
    auto const d = describe(kCase);
    std::vector<void*> bad = buffers.memory;
    void* const outputs[] = {buffers.memory[9]};
    bad[3] = static_cast<char*>(bad[3]) + 2;
    CHECK(run->enqueue(d.data(), d.data() + kInputs, bad.data(), outputs, buffers.memory[10], nullptr) != 0);
    CHECK(logged("not aligned to 16 bytes"));
    CHECK(run->enqueue(d.data(), d.data() + kInputs, buffers.memory.data(), outputs, nullptr, nullptr) != 0);
}

// A tactic that was timed at few tokens also gets the profile's larger shapes: the default tactic takes over.
void testTokenLimit(Fake const& fake) {
    fake.reset();
    moee::Tables const& t = moee::tables();
    auto const* const limited
        = std::find_if(t.tactics, t.tactics + t.tacticCount, [](moee::Tactic const& tactic) { return tactic.maxTokens > 0; });
    CHECK(limited != t.tactics + t.tacticCount);
    LayerShape many = kCase;
    many.lead[0] = limited->maxTokens;  // times 9
    Plugin const built = configured(many);
    Buffers const buffers(many, workspaceOf(built.get(), many));
    Plugin const runtime(recreate(gCreator, built.get()));
    Plugin const attached = attach(runtime.get());
    CHECK(runtimePart(attached.get())->setTactic(limited->id) == 0);
    fake.clearLog();
    CHECK(enqueue(attached.get(), kCase, buffers) == 0);
    CHECK(fake.log().find(limited->launches[1].role) != std::string::npos);
    fake.clearLog();
    CHECK(enqueue(attached.get(), many, buffers) == 0);
    CHECK(fake.log().find(limited->launches[1].role) == std::string::npos);
    // Few tokens an expert take small tiles, many take large ones.
    CHECK(runtimePart(attached.get())->setTactic(0) == 0);
    fake.clearLog();
    CHECK(enqueue(attached.get(), kCase, buffers) == 0);
    CHECK(fake.log().find("group_up_r16") != std::string::npos);
    fake.clearLog();
    CHECK(enqueue(attached.get(), many, buffers) == 0);
    CHECK(fake.log().find("expert_up_bm128") != std::string::npos);
}

// A tactic with a limit of tokens asks for no more than it needs there, and finds that much at its limit.
void testWorkspaceStopsAtTheLimit(Fake const& fake) {
    // ViT-L at 518 pixels, 32 images: masked at all tokens would be 343 MiB.
    int32_t const width = 1536;
    LayerShape const large{2, {32, 1370, 0, 0}, 1024, 4, 4096, 6144, 1};
    Plugin const vit = configured(large, {kGelu, kTopOne, {"max_width", &width, PluginFieldType::kINT32, 1}, kLoads});
    CHECK(vit != nullptr);
    size_t const counts = 256;
    size_t const buckets = 4 * 43840 * 4;
    size_t const routes = 43840 * 4;
    CHECK(workspaceOf(vit.get(), large) == counts + buckets + routes + size_t{43840} * 1536 * 2);

    fake.reset();
    moee::Tables const& t = moee::tables();
    auto const* const limited = std::max_element(t.tactics, t.tactics + t.tacticCount,
        [](moee::Tactic const& a, moee::Tactic const& b) { return a.maxTokens < b.maxTokens; });
    LayerShape at = kCase;
    at.lead[0] = limited->maxTokens / 2;
    at.lead[1] = 2;
    LayerShape above = kCase;
    above.lead[0] = limited->maxTokens + 1;
    above.lead[1] = 1;
    Plugin const built = configured(above);
    Buffers const buffers(at, workspaceOf(built.get(), above));
    Plugin const runtime(recreate(gCreator, built.get()));
    Plugin const attached = attach(runtime.get());
    fake.executor(&touch);
    gTokens = limited->maxTokens;
    CHECK(runtimePart(attached.get())->setTactic(limited->id) == 0);
    fake.clearLog();
    CHECK(enqueue(attached.get(), at, buffers) == 0);
    CHECK(fake.log().find(limited->launches[1].role) != std::string::npos);
    gTokens = 18;
}

// Nothing but masked tactics: above their limit none is chosen, since the workspace holds no more.
void testNoTacticAboveTheLimit() {
    moee::Tables const& t = moee::tables();
    std::vector<moee::Tactic const*> masked;
    for (int32_t i = 0; i < t.tacticCount; ++i) {
        if (moee::kindOf(t.tactics[i]) == moee::Kind::kMasked) {
            masked.push_back(&t.tactics[i]);
        }
    }
    moee::Sizes sizes;
    sizes.tokens = 2048;
    sizes.topK = sizes.experts = 1;
    CHECK(moee::defaultTactic(masked, sizes) != nullptr && moee::defaultTactic(masked, sizes)->maxTokens == 2048);
    sizes.tokens = 2049;
    CHECK(moee::defaultTactic(masked, sizes) == nullptr);
}

// The text of a trace is made only where somebody reads it.
void testTraceWithoutListener() {
    int made = 0;
    auto const text = [&made] {
        ++made;
        return "heard";
    };
    moee::setFinder(nullptr);
    moee::trace(text);
    CHECK(made == 0);
    moee::setFinder(&gLogger);
    moee::trace(text);
    CHECK(made == 1 && logged("VERBOSE [moee] heard"));
}

}  // namespace

void checkLifeCycle(Fake const& fake) {
    testCloneAndSerialise(fake);
    testEnqueue(fake);
    testTokenLimit(fake);
    testWorkspaceStopsAtTheLimit(fake);
    testNoTacticAboveTheLimit();
    testTraceWithoutListener();
}
