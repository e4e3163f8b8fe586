// Creator fields, format combinations, shapes: good, missing, wrong, corrupt.
#include "host_checks.h"

namespace {

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
    int32_t const tooMuch[] = {1, 1000001};
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
             {{kMaxWidth, {"load", kLoad, PluginFieldType::kINT32, 70000}}, "load must be a list"},
             {{kMaxWidth, {"load", tooMuch, PluginFieldType::kINT32, 2}}, "load must not be above a million"},
             {{kMaxWidth, {"activation", "gelu", PluginFieldType::kCHAR, 1 << 30}}, "activation must be a string"},
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
                    LayerShape c = kCase;
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
             {7, {0}}, {7, {1, 130}}, {8, {4}}, {0, {1 << 30, 4, 64}}, {0, {3, int64_t{1} << 62, 64}}}) {
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
    for (int32_t const rank : {-1, 9, 1 << 30}) {  // more dimensions than a description has room for
        Plugin const plugin = create(kGood);
        auto d = describe(kCase, kCase, kCase);
        d[0].desc.dims.nbDims = d[0].min.nbDims = d[0].opt.nbDims = d[0].max.nbDims = rank;
        CHECK(buildPart(plugin.get())->configurePlugin(d.data(), kInputs, d.data() + kInputs, 1) != 0);
    }
    // Sizes that are legal one by one, and whose workspace would overflow 64 bits.
    for (LayerShape const& large : {LayerShape{1, {1 << 30, 0, 0, 0}, 1 << 30, 4, 1 << 30, 130, 1}, LayerShape{1, {1 << 30, 0, 0, 0}, 64, 1 << 30, 100, 130, 1}}) {
        Plugin const plugin = create({kGelu, kTopOne, kMaxWidth});
        auto const d = describe(large, large, large);
        CHECK(buildPart(plugin.get())->configurePlugin(d.data(), kInputs, d.data() + kInputs, 1) != 0);
        CHECK(logged("too large"));
    }
    CHECK(configured(kCase, {kMaxWidth, {"load", kLoad, PluginFieldType::kINT32, 3}}) == nullptr);  // four experts
    int32_t const five = 5;
    CHECK(configured(kCase, {kMaxWidth, {"top_k", &five, PluginFieldType::kINT32, 1}}) == nullptr);
    Plugin const plugin = create(kGood);
    CHECK(buildPart(plugin.get())->configurePlugin(describe(kCase, kCase, kCase).data(), 8, nullptr, 1) != 0);
}

}  // namespace

void checkCreatorAndShapes() {
    testCreatorFields();
    testFormats();
    testBadShapes();
}
