#include "plugin/creator.h"

#include "plugin/plugin.h"
#include "tensorrt/log.h"

#include <cstring>
#include <exception>
#include <memory>

namespace moee {
namespace {

using namespace nvinfer1;

constexpr int32_t kMaxHash = 128;  // characters; the length comes from a file

// Tactic ids are stable, but a kernel change can turn a tuned choice into a poor one.
void warnOfOtherKernels(PluginFieldCollection const& fields) {
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        PluginField const& field = fields.fields[i];
        if (field.name == nullptr || std::strcmp(field.name, "kernels") != 0 || field.data == nullptr || field.length < 0
            || field.length > kMaxHash || field.type != PluginFieldType::kCHAR) {
            continue;
        }
        std::string const built(static_cast<char const*>(field.data), static_cast<size_t>(field.length));
        if (built != tables().sourceHash) {
            logWarning("the engine was tuned with other kernels (" + built.substr(0, 12) + ") than this library's ("
                + std::string(tables().sourceHash).substr(0, 12) + "); build it again for the best tactics");
        }
    }
}

}  // namespace

MoeeFfnCreator::MoeeFfnCreator() {
    mFields.emplace_back("activation", nullptr, PluginFieldType::kCHAR, 1);
    mFields.emplace_back("top_k", nullptr, PluginFieldType::kINT32, 1);
    mFields.emplace_back("max_width", nullptr, PluginFieldType::kINT32, 1);
    mFields.emplace_back("load", nullptr, PluginFieldType::kINT32, 0);
    mFields.emplace_back("plugin_version", nullptr, PluginFieldType::kCHAR, 1);
    mFields.emplace_back("plugin_namespace", nullptr, PluginFieldType::kCHAR, 1);
    mCollection = PluginFieldCollection{static_cast<int32_t>(mFields.size()), mFields.data()};
}

IPluginV3* MoeeFfnCreator::createPlugin(
    char const* name, PluginFieldCollection const* fields, TensorRTPhase phase) noexcept {
    try {
        std::string const layer = name != nullptr ? name : "";
        Attributes attributes;
        std::string why;
        if (!readAttributes(fields, attributes, why)) {
            logError("MoeeFfn " + layer + ": " + why);
            return nullptr;
        }
        bool const runtime = phase == TensorRTPhase::kRUNTIME;
        auto plugin = std::make_unique<MoeeFfn>(std::move(attributes), phase);
        if (runtime && !plugin->restore(fields)) {
            logError("MoeeFfn " + layer + ": the engine's serialised type and sizes are missing or corrupt; build it again");
            return nullptr;
        }
        if (runtime) {
            warnOfOtherKernels(*fields);
        }
        trace([&] {
            return "trace create phase=" + std::string(runtime ? "runtime" : "build") + " name=" + layer + " "
                + plugin->getMetadataString();
        });
        return plugin.release();
    } catch (std::exception const& error) {
        logError(std::string("MoeeFfn createPlugin: ") + error.what());
    } catch (...) {
        logError("MoeeFfn createPlugin: unknown exception");
    }
    return nullptr;
}

}  // namespace moee
