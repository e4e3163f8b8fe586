// Makes plugin layers from an ONNX node's attributes or from an engine's serialised fields.
#pragma once

#include "operator/operator.h"

#include <NvInferRuntime.h>

#include <vector>

namespace moee {

class MoeeFfnCreator final : public nvinfer1::IPluginCreatorV3One {
public:
    MoeeFfnCreator();
    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }
    char const* getPluginName() const noexcept override { return kPluginName; }
    char const* getPluginVersion() const noexcept override { return kPluginVersion; }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

private:
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

}  // namespace moee
