// Life cycle of the plugin object: construction, cloning, serialisation.
#include "plugin/plugin.h"

#include "plugin/support.h"

#include <utility>

namespace moee {
namespace {

using namespace nvinfer1;

char const* const kSerializedNames[] = {"type", "dim", "experts", "union_size"};

}  // namespace

MoeeFfn::MoeeFfn(Attributes attributes, TensorRTPhase phase) : mAttributes(std::move(attributes)), mPhase(phase) {}

// The storage behind returned pointers stays with each object.
MoeeFfn::MoeeFfn(MoeeFfn const& other)
    : IPluginV3(other), IPluginV3OneCore(other), IPluginV3OneBuild(other), IPluginV3OneRuntime(other),
      mAttributes(other.mAttributes), mPhase(other.mPhase), mConfigured(other.mConfigured), mSizes(other.mSizes),
      mTactic(other.mTactic), mPrograms(other.mPrograms) {}

bool MoeeFfn::restore(PluginFieldCollection const* fields) {
    std::array<int32_t, 4> values{};
    for (size_t i = 0; i < values.size(); ++i) {
        if (!readInt(fields, kSerializedNames[i], values[i]) || values[i] < 0 || (i > 0 && values[i] < 1)) {
            return false;
        }
    }
    if (values[0] > static_cast<int32_t>(Type::kBfloat16) || values[1] % kDimMultiple != 0
        || values[2] < mAttributes.topK || values[3] < mAttributes.maxWidth) {
        return false;
    }
    readInt(fields, "code", mAttributes.code);  // no engine has it
    mSizes = Sizes{0, values[1], values[2], values[3], mAttributes.maxWidth, mAttributes.topK, mAttributes.activation,
        static_cast<Type>(values[0])};
    mConfigured = true;
    return true;
}

IPluginCapability* MoeeFfn::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* MoeeFfn::clone() noexcept {
    return guarded("clone", static_cast<IPluginV3*>(nullptr), [&]() -> IPluginV3* {
        trace([&] { return "trace clone"; });
        return new MoeeFfn(*this);
    });
}

PluginFieldCollection const* MoeeFfn::getFieldsToSerialize() noexcept {
    return guarded("getFieldsToSerialize", static_cast<PluginFieldCollection const*>(nullptr), [&] {
        // `load` steers the builder's timing alone. Type and sizes let attachToContext load before shapes are known.
        mSerialized = {static_cast<int32_t>(mSizes.type), mSizes.dim, mSizes.experts, mSizes.unionSize};
        char const* const activation = kActivations[static_cast<size_t>(mAttributes.activation)];
        mFields.clear();
        mFields.emplace_back("activation", activation, PluginFieldType::kCHAR,
            static_cast<int32_t>(std::char_traits<char>::length(activation)));
        mFields.emplace_back("top_k", &mAttributes.topK, PluginFieldType::kINT32, 1);
        mFields.emplace_back("max_width", &mAttributes.maxWidth, PluginFieldType::kINT32, 1);
        for (size_t i = 0; i < mSerialized.size(); ++i) {
            mFields.emplace_back(kSerializedNames[i], &mSerialized[i], PluginFieldType::kINT32, 1);
        }
        char const* const hash = tables().sourceHash;
        mFields.emplace_back(
            "kernels", hash, PluginFieldType::kCHAR, static_cast<int32_t>(std::char_traits<char>::length(hash)));
        mCollection = PluginFieldCollection{static_cast<int32_t>(mFields.size()), mFields.data()};
        trace([&] { return "trace serialize fields=" + std::to_string(mFields.size()); });
        return static_cast<PluginFieldCollection const*>(&mCollection);
    });
}

}  // namespace moee
