// Random input for everything of the plugin that a file or TensorRT hands over: `moee_host fuzz SEED COUNT`, COUNT inputs of each
// kind. Buffers are as large as their description says, so that the sanitizers see each access beyond.
#include "host_checks.h"
#include "operator/tables.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>

namespace {

using Random = std::mt19937_64;

template <typename T>
T pick(Random& random, std::vector<T> const& from) { return from[random() % from.size()]; }
bool chance(Random& random, int percent) { return static_cast<int>(random() % 100) < percent; }

std::vector<int64_t> const kExtents{-1, 0, 1, 2, 4, 5, 9, 15, 16, 17, 63, 64, 65, 99, 100, 101, 130, 1 << 16, (1 << 16) + 1,
    1 << 30, std::numeric_limits<int32_t>::max(), int64_t{1} << 31, int64_t{1} << 32, int64_t{1} << 62,
    std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()};
std::vector<int32_t> const kInts{-1, 0, 1, 2, 4, 40, 100, 101, 1 << 20, std::numeric_limits<int32_t>::max(),
    std::numeric_limits<int32_t>::min(), 0x7fc00000 /* a float's NaN */};

// A field with a buffer of its own, as long as the field says.
struct Owned {
    std::string name;
    PluginFieldType type{PluginFieldType::kINT32};
    std::vector<char> data;
    int32_t length{0};
    bool null{false};
};

size_t itemBytes(PluginFieldType type) {
    switch (type) {
    case PluginFieldType::kFLOAT64:
    case PluginFieldType::kINT64: return 8;
    case PluginFieldType::kFLOAT32:
    case PluginFieldType::kINT32: return 4;
    case PluginFieldType::kFLOAT16:
    case PluginFieldType::kINT16:
    case PluginFieldType::kBF16: return 2;
    case PluginFieldType::kDIMS: return sizeof(Dims);
    default: return 1;
    }
}

// The fields' data are copied to the heap, each alone: an access beyond it is a report.
IPluginV3* made(std::vector<Owned> const& owned, TensorRTPhase phase, bool nullName = false) {
    std::vector<std::unique_ptr<char[]>> memory;
    Fields fields;
    for (Owned const& field : owned) {
        memory.push_back(std::make_unique<char[]>(field.data.size()));
        std::copy(field.data.begin(), field.data.end(), memory.back().get());
        fields.emplace_back(field.name.c_str(), field.null ? nullptr : memory.back().get(), field.type, field.length);
    }
    if (nullName && !fields.empty()) {
        fields[0].name = nullptr;
    }
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return gCreator->createPlugin("fuzzed", &collection, phase);
}

Owned integers(std::string name, std::vector<int32_t> const& values) {
    Owned field{std::move(name), PluginFieldType::kINT32, std::vector<char>(values.size() * 4), static_cast<int32_t>(values.size())};
    std::copy_n(reinterpret_cast<char const*>(values.data()), field.data.size(), field.data.begin());
    return field;
}
Owned text(std::string name, std::string const& value) {
    return {std::move(name), PluginFieldType::kCHAR, {value.begin(), value.end()}, static_cast<int32_t>(value.size())};
}

std::vector<Owned> randomFields(Random& random) {
    std::vector<Owned> fields;
    std::vector<std::string> const names{"activation", "top_k", "max_width", "load", "plugin_version", "plugin_namespace", "type",
        "dim", "experts", "union_size", "kernels", "", "unknown", std::string(3000, 'n')};
    if (chance(random, 60)) {
        fields = {text("activation", pick<std::string>(random, {"gelu", "gelu_tanh", "relu", "silu", "quick_gelu"})),
            integers("top_k", {1}), integers("max_width", {40})};
    }
    for (auto more = random() % 6; more > 0; --more) {
        switch (random() % 4) {
        case 0: fields.push_back(integers(pick(random, names), {pick(random, kInts)})); break;
        case 1: fields.push_back(text(pick(random, names), std::string(random() % 200, static_cast<char>(random())))); break;
        case 2: {
            std::vector<int32_t> values(random() % 40);
            std::generate(values.begin(), values.end(), [&] { return chance(random, 80) ? static_cast<int32_t>(random() % 1000000) : pick(random, kInts); });
            fields.push_back(integers(chance(random, 70) ? "load" : pick(random, names), values));
            break;
        }
        default: {
            Owned field{pick(random, names), static_cast<PluginFieldType>(random() % 14), {}, 0};
            field.data.resize(itemBytes(field.type) * (random() % 20));
            std::generate(field.data.begin(), field.data.end(), [&] { return static_cast<char>(random()); });
            field.length = static_cast<int32_t>(field.data.size() / itemBytes(field.type));
            fields.push_back(field);
        }
        }
    }
    std::shuffle(fields.begin(), fields.end(), random);
    if (!fields.empty() && chance(random, 25)) {  // lengths that no buffer has: refused before the data are looked at
        Owned& lied = fields[random() % fields.size()];
        lied.length = pick<int32_t>(random, {-1, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max(), 1 << 30, 70000});
        lied.null = chance(random, 30);
    }
    if (!fields.empty() && chance(random, 10)) {
        fields[random() % fields.size()].null = true;
    }
    return fields;
}

Dims randomDims(Random& random) {
    Dims d{};
    d.nbDims = chance(random, 90) ? static_cast<int32_t>(random() % 9)
                                  : pick<int32_t>(random, {-1, 9, 100, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()});
    for (int64_t& extent : d.d) {
        extent = pick(random, kExtents);
    }
    return d;
}

// A good description with up to four places changed.
std::array<DynamicPluginTensorDesc, kTensors> randomDescriptions(Random& random) {
    LayerShape c = kCase;
    c.type = static_cast<int32_t>(random() % 10);
    auto d = describe(c, c, c);
    for (auto changes = random() % 5; changes > 0; --changes) {
        DynamicPluginTensorDesc& tensor = d[random() % kTensors];
        std::array<Dims*, 4> const places{&tensor.desc.dims, &tensor.min, &tensor.opt, &tensor.max};
        switch (random() % 5) {
        case 0: tensor.desc.type = static_cast<DataType>(random() % 14); break;
        case 1: tensor.desc.format = static_cast<TensorFormat>(random() % 16); break;
        case 2: *places[random() % 4] = randomDims(random); break;
        case 3: tensor.desc.dims = tensor.min = tensor.opt = tensor.max = randomDims(random); break;
        default:
            for (Dims* place : places) {
                place->d[random() % 3] = pick(random, kExtents);
            }
        }
    }
    if (chance(random, 30)) {  // consistent, however large: every tensor with the same D, K and U
        int64_t const dim = pick(random, kExtents);
        int64_t const experts = std::min(pick(random, kExtents), std::numeric_limits<int64_t>::max() - 1);
        int64_t const unionSize = pick(random, kExtents);
        LayerShape const large{2, {pick(random, kExtents), pick(random, kExtents), 0, 0}, dim, experts, unionSize, 130, 1};
        d = describe(large, large, large);
    }
    return d;
}

std::array<PluginTensorDesc, kTensors> staticOf(std::array<DynamicPluginTensorDesc, kTensors> const& from) {
    std::array<PluginTensorDesc, kTensors> to{};
    for (size_t i = 0; i < to.size(); ++i) {
        to[i] = from[i].desc;
        to[i].dims = from[i].max;
    }
    return to;
}

// Every build and runtime method that takes descriptions.
void describeAll(IPluginV3* plugin, Random& random) {
    auto const d = randomDescriptions(random);
    IPluginV3OneBuild* const build = buildPart(plugin);
    for (int32_t pos = -1; pos <= kTensors; ++pos) {
        build->supportsFormatCombination(pos, d.data(), kInputs, chance(random, 95) ? 1 : static_cast<int32_t>(random() % 4));
    }
    int32_t const inputs = chance(random, 95) ? kInputs : static_cast<int32_t>(random());
    build->configurePlugin(d.data(), inputs, d.data() + kInputs, 1);
    build->getWorkspaceSize(d.data(), kInputs, d.data() + kInputs, 1);
    std::vector<int32_t> tactics(static_cast<size_t>(std::max(build->getNbTactics(), 0)));
    build->getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size()));
    DataType output{};
    std::array<DataType, kInputs> types{};
    build->getOutputDataTypes(&output, 1, types.data(), kInputs);
    CHECK(build->getTimingCacheID() != nullptr && build->getMetadataString() != nullptr);
    auto const fixed = staticOf(d);
    runtimePart(plugin)->onShapeChange(fixed.data(), kInputs, fixed.data() + kInputs, 1);
    runtimePart(plugin)->setTactic(chance(random, 50) ? static_cast<int32_t>(random() % 40) : pick(random, kInts));
    Plugin const copy(plugin->clone());
    Plugin const again(recreate(gCreator, copy.get()));
}

// Sizes of the layer that is being run, for `touchAll`.
struct Running {
    LayerShape c;
    int64_t tokens, topK, maxWidth;
};
Running gRunning;
unsigned volatile gSum = 0;  // keeps reads from being optimised away

// In a kernel's place: reads all of each input and writes all of each workspace buffer and of y.
int touchAll(char const* symbol, unsigned const*, unsigned, unsigned, void** args) {
    moee::Tables const& t = moee::tables();
    auto const* const kernel = std::find_if(
        t.kernels, t.kernels + t.kernelCount, [&](moee::Kernel const& k) { return std::strcmp(k.symbol, symbol) == 0; });
    if (kernel == t.kernels + t.kernelCount) {
        return 1;
    }
    LayerShape const& c = gRunning.c;
    int64_t const slots = gRunning.tokens * gRunning.topK;
    int64_t const item = c.type == 0 ? 4 : 2;
    auto const rows = [](int64_t width) { return (width + 15) / 16 * 16; };
    bool const masked = std::strncmp(kernel->role, "masked", 6) == 0;
    for (int32_t a = 0; a < kernel->argCount; ++a) {
        int64_t bytes = 0;
        bool writes = true;
        switch (kernel->args[a]) {
        case moee::Arg::kX: bytes = gRunning.tokens * c.dim * item, writes = false; break;
        case moee::Arg::kRouter: bytes = c.experts * c.dim * item, writes = false; break;
        case moee::Arg::kRouterBias: bytes = c.experts * 4, writes = false; break;
        case moee::Arg::kWUp:
        case moee::Arg::kWDown: bytes = c.unionSize * c.dim * item, writes = false; break;
        case moee::Arg::kBUp: bytes = c.unionSize * item, writes = false; break;
        case moee::Arg::kBOut: bytes = c.experts * c.dim * item, writes = false; break;
        case moee::Arg::kNeurons: bytes = c.neurons * 4, writes = false; break;
        case moee::Arg::kOffsets: bytes = (c.experts + 1) * 4, writes = false; break;
        case moee::Arg::kLoadCdf: bytes = c.experts * 4, writes = false; break;
        case moee::Arg::kCounts: bytes = c.experts * 4; break;
        case moee::Arg::kBuckets: bytes = c.experts * gRunning.tokens * 4; break;
        case moee::Arg::kRoutes: bytes = slots * 4; break;
        case moee::Arg::kMember: bytes = c.experts * c.unionSize; break;
        case moee::Arg::kHidden:
            bytes = masked ? gRunning.tokens * rows(c.unionSize) * item : slots * rows(gRunning.maxWidth) * item;
            break;
        case moee::Arg::kPartial: bytes = gRunning.topK > 1 && !masked ? slots * c.dim * 4 : 0; break;
        case moee::Arg::kY: bytes = gRunning.tokens * c.dim * item; break;
        default: continue;
        }
        auto* const at = *static_cast<unsigned char**>(args[a]);
        if (at == nullptr) {
            continue;
        }
        if (writes) {
            std::memset(at, 0x5A, static_cast<size_t>(bytes));
        } else {
            gSum = gSum + std::accumulate(at, at + bytes, 0U);
        }
    }
    return 0;
}

// A legal layer from its configuration to its launches, with a driver that may fail at any call.
void liveThrough(Fake const& fake, Random& random) {
    fake.reset();
    fake.device(pick<int>(random, {8, 8, 8, 9, 12, 7}), pick<int>(random, {0, 6, 7, 9}));
    fake.executor(&touchAll);
    int64_t const experts = 1 + static_cast<int64_t>(random() % 9);
    int64_t const unionSize = 1 + static_cast<int64_t>(random() % 70);
    LayerShape c{1 + static_cast<int32_t>(random() % 3), {}, 16 * (1 + static_cast<int64_t>(random() % 8)), experts, unionSize,
        experts * (1 + static_cast<int64_t>(random() % static_cast<uint64_t>(unionSize))), pick<int32_t>(random, {0, 1, 7})};
    int64_t tokens = 1;
    for (int32_t i = 0; i < c.leadCount; ++i) {
        c.lead[i] = static_cast<int64_t>(random() % 9);
        tokens *= c.lead[i];
    }
    auto const topK = 1 + static_cast<int32_t>(random() % static_cast<uint64_t>(std::min<int64_t>(experts, 3)));
    auto const width = 1 + static_cast<int32_t>(random() % static_cast<uint64_t>(unionSize));
    std::vector<Owned> fields{text("activation", "silu"), integers("top_k", {topK}), integers("max_width", {width})};
    if (chance(random, 50)) {
        fields.push_back(integers("load", std::vector<int32_t>(static_cast<size_t>(experts), 1 + static_cast<int32_t>(random() % 1000000))));
    }
    Plugin const plugin(made(fields, TensorRTPhase::kBUILD));
    CHECK(plugin != nullptr);
    if (chance(random, 30)) {
        char const* const calls[] = {"cuCtxGetCurrent", "cuCtxGetDevice", "cuDeviceGetAttribute", "cuModuleLoadDataEx",
            "cuModuleGetFunction", "cuFuncSetAttribute", "cuMemAlloc_v2", "cuMemcpyHtoD_v2", "cuMemsetD32Async", "cuLaunchKernel"};
        fake.fail(calls[random() % std::size(calls)], static_cast<int>(random() % 4), pick<int>(random, {1, 2, 200, 209, 700, 999}));
    }
    auto const d = describe(c, c, c);
    IPluginV3OneBuild* const build = buildPart(plugin.get());
    if (build->configurePlugin(d.data(), kInputs, d.data() + kInputs, 1) != 0) {
        return;
    }
    Buffers const buffers(c, workspaceOf(plugin.get(), c));
    gRunning = Running{c, tokens, topK, width};
    auto const fixed = describe(c);
    Plugin const runtime(chance(random, 70) ? recreate(gCreator, plugin.get()) : plugin->clone());  // a clone: the builder's timing
    if (runtime == nullptr) {
        return;
    }
    Plugin const attached(runtimePart(runtime.get())->attachToContext(nullptr));
    if (attached == nullptr) {
        return;
    }
    for (int round = 0; round < 3; ++round) {
        runtimePart(attached.get())->onShapeChange(fixed.data(), kInputs, fixed.data() + kInputs, 1);
        runtimePart(attached.get())->setTactic(static_cast<int32_t>(random() % 30));
        fake.capture(chance(random, 50) ? 1 : 0);
        enqueue(attached.get(), c, buffers);
        CHECK(fake.log().find("FORBIDDEN") == std::string::npos);
        fake.capture(0);
        auto const other = staticOf(randomDescriptions(random));  // shapes that the buffers do not have: they must not be launched
        if (other[0].dims.nbDims != fixed[0].dims.nbDims || other[1].dims.d[0] < 0) {
            runtimePart(attached.get())->onShapeChange(other.data(), kInputs, other.data() + kInputs, 1);
        }
    }
}

// What an engine file holds of the plugin, as bytes: damaged, read again as far as it goes, and used.
void deserialise(Fake const& fake, Random& random) {
    fake.reset();
    Plugin const good = configured();
    PluginFieldCollection const* const fields = runtimePart(good.get())->getFieldsToSerialize();
    std::vector<Owned> read;
    std::string bytes;
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        PluginField const& f = fields->fields[i];
        bytes += std::string(f.name) + '\0' + static_cast<char>(f.type) + static_cast<char>(f.length);
        bytes.append(static_cast<char const*>(f.data), itemBytes(f.type) * static_cast<size_t>(f.length));
    }
    for (auto flips = random() % 6; flips > 0; --flips) {
        bytes[random() % bytes.size()] ^= static_cast<char>(1U << (random() % 8));
    }
    bytes.resize(chance(random, 40) ? random() % (bytes.size() + 1) : bytes.size());
    for (size_t at = 0; at < bytes.size();) {
        size_t const end = std::min(bytes.find('\0', at), bytes.size());
        Owned field{bytes.substr(at, end - at), PluginFieldType::kUNKNOWN, {}, 0};
        at = end + 1;
        if (at + 2 <= bytes.size()) {
            field.type = static_cast<PluginFieldType>(static_cast<unsigned char>(bytes[at]));
            size_t const item = itemBytes(field.type);
            size_t const left = (bytes.size() - at - 2) / item;
            field.length = static_cast<int32_t>(std::min<size_t>(static_cast<unsigned char>(bytes[at + 1]), left));
            auto const* const begin = bytes.data() + at + 2;
            field.data.assign(begin, begin + item * static_cast<size_t>(field.length));
            at += 2 + field.data.size();
        }
        read.push_back(field);
    }
    Plugin const plugin(made(read, TensorRTPhase::kRUNTIME));
    if (plugin == nullptr) {
        return;
    }
    Plugin const attached(runtimePart(plugin.get())->attachToContext(nullptr));
    if (attached == nullptr) {
        return;
    }
    Buffers const buffers(kCase, workspaceOf(good.get(), kCase));
    auto const d = describe(kCase);
    if (runtimePart(attached.get())->onShapeChange(d.data(), kInputs, d.data() + kInputs, 1) == 0) {
        enqueue(attached.get(), kCase, buffers);
    }
    Plugin const again(recreate(gCreator, attached.get()));
    CHECK(again != nullptr);
}

}  // namespace

void fuzz(Fake const& fake, uint64_t seed, uint64_t count) {
    uint64_t accepted = 0;
    for (uint64_t i = 0; i < count; ++i) {
        Random random(seed + i);
        gLogger.lines.clear();
        fake.reset();
        Plugin const built(made(randomFields(random), static_cast<TensorRTPhase>(random() % 2), chance(random, 5)));
        accepted += built != nullptr ? 1U : 0U;
        if (built != nullptr) {
            describeAll(built.get(), random);
        }
        Plugin const plain = create(kGood);
        describeAll(plain.get(), random);
        deserialise(fake, random);
        liveThrough(fake, random);
        fake.reset();
    }
    CHECK(fake.liveModules() == 0 && fake.liveMemory() == 0);
    std::printf("%llu inputs of each kind, %llu of the random field lists accepted\n", static_cast<unsigned long long>(count),
        static_cast<unsigned long long>(accepted));
}
