// What TensorRT does to a plugin: tensor descriptions, a logger, the creator's calls. For the self-test and for the tests.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

using namespace nvinfer1;

constexpr int kInputs = 9;
constexpr int kTensors = 10;

class HostLogger final : public ILogger, public ILoggerFinder {
public:
    void log(Severity severity, char const* text) noexcept override {
        static char const* const names[] = {"INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"};
        lines += std::string(names[static_cast<int>(severity)]) + " " + text + "\n";
    }
    ILogger* findLogger() override { return this; }
    std::string lines;
};

// Shapes of one layer; `x` is [lead..., dim].
struct LayerShape {
    int32_t leadCount;
    int64_t lead[4];
    int64_t dim, experts, unionSize, neurons;
    int32_t type;  // nvinfer1::DataType of the tokens
};

inline Dims dims(std::vector<int64_t> const& values) {
    Dims d{};
    d.nbDims = static_cast<int32_t>(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
        d.d[i] = values[i];
    }
    return d;
}

inline std::array<PluginTensorDesc, kTensors> describe(LayerShape const& c) {
    std::vector<int64_t> x(c.lead, c.lead + c.leadCount);
    x.push_back(c.dim);
    std::vector<std::vector<int64_t>> const shapes{x, {c.experts, c.dim}, {c.experts}, {c.unionSize, c.dim}, {c.unionSize},
        {c.unionSize, c.dim}, {c.experts, c.dim}, {c.neurons}, {c.experts + 1}, x};
    std::array<PluginTensorDesc, kTensors> out{};
    for (size_t i = 0; i < out.size(); ++i) {
        out[i].dims = dims(shapes[i]);
        out[i].format = TensorFormat::kLINEAR;
        out[i].type = i == 2 ? DataType::kFLOAT : i == 7 || i == 8 ? DataType::kINT32 : static_cast<DataType>(c.type);
    }
    return out;
}

// Profile of min, opt and max: the leading dimensions of `low`, `c` and `high`.
inline std::array<DynamicPluginTensorDesc, kTensors> describe(LayerShape const& low, LayerShape const& c, LayerShape const& high) {
    auto const a = describe(low);
    auto const b = describe(c);
    auto const z = describe(high);
    std::array<DynamicPluginTensorDesc, kTensors> out{};
    for (size_t i = 0; i < out.size(); ++i) {
        out[i].desc = b[i];
        out[i].min = a[i].dims;
        out[i].opt = b[i].dims;
        out[i].max = z[i].dims;
    }
    out[0].desc.dims.d[0] = -1;
    out[9].desc.dims.d[0] = -1;
    return out;
}

inline IPluginV3OneBuild* buildPart(IPluginV3* plugin) {
    return static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}
inline IPluginV3OneRuntime* runtimePart(IPluginV3* plugin) {
    return static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

// Copies the serialised fields byte by byte, as an engine file would, and makes a plugin from the copy. `code`, where it is
// not 0, names the SM whose kernels alone are to run.
inline IPluginV3* recreate(IPluginCreatorV3One* creator, IPluginV3* plugin, int32_t code = 0) {
    PluginFieldCollection const* const fields = runtimePart(plugin)->getFieldsToSerialize();
    if (fields == nullptr) {
        return nullptr;
    }
    std::vector<std::string> names;
    std::vector<std::vector<char>> data;
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        PluginField const& f = fields->fields[i];
        size_t const size = f.type == PluginFieldType::kINT32 ? 4 : 1;
        char const* const begin = static_cast<char const*>(f.data);
        names.emplace_back(f.name);
        data.emplace_back(begin, begin + size * static_cast<size_t>(f.length));
    }
    std::vector<PluginField> copy;
    for (size_t i = 0; i < names.size(); ++i) {
        copy.emplace_back(names[i].c_str(), data[i].data(), fields->fields[i].type, fields->fields[i].length);
    }
    if (code != 0) {
        copy.emplace_back("code", &code, PluginFieldType::kINT32, 1);
    }
    PluginFieldCollection const collection{static_cast<int32_t>(copy.size()), copy.data()};
    return creator->createPlugin("recreated", &collection, TensorRTPhase::kRUNTIME);
}
