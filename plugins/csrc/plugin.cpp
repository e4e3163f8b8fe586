#include "plugin.h"

#include "launch.h"
#include "log.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <utility>

namespace moee {
namespace {

using namespace nvinfer1;

constexpr int32_t kFailure = 1;

// Runs `body`; nothing may throw out of TensorRT's noexcept methods.
template <typename Result, typename Body>
Result guarded(char const* method, Result onError, Body&& body) noexcept {
    try {
        return body();
    } catch (std::exception const& error) {
        logError(std::string(method) + ": " + error.what());
    } catch (...) {
        logError(std::string(method) + ": unknown exception");
    }
    return onError;
}

int32_t fail(char const* method, std::string const& why) {
    logError(std::string("MoeeFfn ") + method + ": " + why);
    return kFailure;
}

bool countsFit(char const* method, int32_t inputs, int32_t outputs) {
    if (inputs == kInputs && outputs == kOutputs) {
        return true;
    }
    fail(method, "expected 9 inputs and 1 output; came " + std::to_string(inputs) + " and " + std::to_string(outputs));
    return false;
}

template <typename Get>
std::array<Dims, kInputs> shapesOf(Get&& get) {
    std::array<Dims, kInputs> shapes{};
    for (int32_t i = 0; i < kInputs; ++i) {
        shapes[static_cast<size_t>(i)] = get(i);
    }
    return shapes;
}

std::string text(Dims const& dims) {
    std::string out = "[";
    for (int32_t i = 0; i < std::min(dims.nbDims, Dims::MAX_DIMS); ++i) {
        out += (i > 0 ? "," : "") + std::to_string(dims.d[i]);
    }
    return out + "]";
}

// FNV-1a: tells apart expert loads in the timing cache id.
std::string digest(std::vector<int32_t> const& values) {
    uint64_t hash = 14695981039346656037U;
    for (int32_t const value : values) {
        hash = (hash ^ static_cast<uint32_t>(value)) * 1099511628211U;
    }
    std::array<char, 17> hex{};
    std::snprintf(hex.data(), hex.size(), "%016llx", static_cast<unsigned long long>(hash));
    return hex.data();
}

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
        trace("trace clone");
        return new MoeeFfn(*this);
    });
}

int32_t MoeeFfn::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*,
    int32_t nbOutputs) noexcept {
    return guarded("configurePlugin", kFailure, [&] {
        if (!countsFit("configurePlugin", nbInputs, nbOutputs)) {
            return kFailure;
        }
        std::string why;
        Sizes sizes;
        // The opt shape is the one that TensorRT times. Some callers leave it unset; then only the weights are known.
        auto const shapes = shapesOf([&](int32_t i) {
            bool const unset = in[i].opt.nbDims != in[i].desc.dims.nbDims;
            return unset ? in[i].desc.dims : in[i].opt;
        });
        if (!readSizes(shapes, in[kInX].desc.type, mAttributes, true, sizes, why)) {
            return fail("configurePlugin", why);
        }
        mSizes = sizes;
        if (tacticsHere().empty()) {
            return fail("configurePlugin", std::string("this library has no ") + typeName(sizes.type)
                    + " kernels for this layer and device; it was built for SM " + builtSms(sizes.type));
        }
        mConfigured = true;
        trace("trace configure x=" + text(shapes[kInX]) + " type=" + typeName(sizes.type)
            + " experts=" + std::to_string(sizes.experts) + " union=" + std::to_string(sizes.unionSize)
            + " max_width=" + std::to_string(sizes.maxWidth));
        return 0;
    });
}

int32_t MoeeFfn::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept {
    return guarded("getOutputDataTypes", kFailure, [&] {
        if (!countsFit("getOutputDataTypes", nbInputs, nbOutputs)) {
            return kFailure;
        }
        outputTypes[0] = inputTypes[kInX];
        return 0;
    });
}

int32_t MoeeFfn::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder&) noexcept {
    return guarded("getOutputShapes", kFailure, [&] {
        if (!countsFit("getOutputShapes", nbInputs, nbOutputs)) {
            return kFailure;
        }
        outputs[0] = inputs[kInX];
        trace("trace shapes rank=" + std::to_string(inputs[kInX].nbDims));
        return 0;
    });
}

bool MoeeFfn::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept {
    return guarded("supportsFormatCombination", false, [&] {
        if (!countsFit("supportsFormatCombination", nbInputs, nbOutputs) || pos < 0 || pos >= kInputs + kOutputs) {
            return false;
        }
        PluginTensorDesc const& desc = inOut[pos].desc;
        bool wanted = false;
        Type type{};
        switch (pos) {
        case kInX: wanted = tokenType(desc.type, type); break;
        case kInRouterBias: wanted = desc.type == DataType::kFLOAT; break;
        case kInNeurons:
        case kInOffsets: wanted = desc.type == DataType::kINT32; break;
        default: wanted = desc.type == inOut[kInX].desc.type; break;
        }
        bool const supported = wanted && desc.format == TensorFormat::kLINEAR;
        trace("trace format pos=" + std::to_string(pos) + " type=" + std::to_string(static_cast<int32_t>(desc.type))
            + " format=" + std::to_string(static_cast<int32_t>(desc.format)) + " -> " + (supported ? "yes" : "no"));
        return supported;
    });
}

size_t MoeeFfn::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t nbInputs, DynamicPluginTensorDesc const*,
    int32_t nbOutputs) const noexcept {
    return guarded("getWorkspaceSize", size_t{0}, [&] {
        std::string why;
        Sizes sizes;
        auto const shapes = [&] { return shapesOf([&](int32_t i) { return inputs[i].max; }); };
        if (!countsFit("getWorkspaceSize", nbInputs, nbOutputs)
            || !readSizes(shapes(), inputs[kInX].desc.type, mAttributes, false, sizes, why)) {
            fail("getWorkspaceSize", why);
            return size_t{0};
        }
        size_t bytes = 0;
        // Over every tactic, not the advertised ones alone: a call may fall back to the default tactic.
        for (Tactic const* tactic : validTactics(sizes.type, sizes.dim, sizes.topK, 0, 0)) {
            bytes = std::max(bytes, layOut(sizes, kindOf(*tactic)).bytes);
        }
        trace("trace workspace tokens=" + std::to_string(sizes.tokens) + " bytes=" + std::to_string(bytes));
        return bytes;
    });
}

std::vector<Tactic const*> MoeeFfn::tacticsHere() const {
    std::string ignored;  // engines are also built where there is no GPU
    return validTactics(mSizes.type, mSizes.dim, mSizes.topK, mSizes.tokens, currentSm(ignored));
}

int32_t MoeeFfn::getNbTactics() noexcept {
    return guarded("getNbTactics", 0, [&] { return mConfigured ? static_cast<int32_t>(tacticsHere().size()) : 0; });
}

int32_t MoeeFfn::getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept {
    return guarded("getValidTactics", kFailure, [&] {
        auto const valid = mConfigured ? tacticsHere() : std::vector<Tactic const*>{};
        if (nbTactics != static_cast<int32_t>(valid.size())) {
            return fail("getValidTactics", "asked for " + std::to_string(nbTactics) + " tactics; there are "
                    + std::to_string(valid.size()));
        }
        std::string ids;
        for (size_t i = 0; i < valid.size(); ++i) {
            tactics[i] = valid[i]->id;
            ids += (i > 0 ? "," : "") + std::to_string(valid[i]->id);
        }
        trace("trace tactics " + ids);
        return 0;
    });
}

char const* MoeeFfn::getTimingCacheID() noexcept {
    return guarded("getTimingCacheID", static_cast<char const*>(nullptr), [&] {
        mTimingCacheId = std::string(kPluginName) + "-" + tables().sourceHash + "-a" + std::to_string(mAttributes.activation)
            + "-k" + std::to_string(mAttributes.topK) + "-w" + std::to_string(mAttributes.maxWidth) + "-l"
            + digest(mAttributes.load);
        if (mConfigured) {
            mTimingCacheId += std::string("-") + typeName(mSizes.type) + "-D" + std::to_string(mSizes.dim) + "-K"
                + std::to_string(mSizes.experts) + "-U" + std::to_string(mSizes.unionSize);
        }
        trace("trace timing_cache " + mTimingCacheId);
        return mTimingCacheId.c_str();
    });
}

char const* MoeeFfn::getMetadataString() noexcept {
    return guarded("getMetadataString", static_cast<char const*>(nullptr), [&] {
        mMetadata = std::string("activation=") + kActivations[static_cast<size_t>(mAttributes.activation)]
            + " top_k=" + std::to_string(mAttributes.topK) + " max_width=" + std::to_string(mAttributes.maxWidth)
            + " load=" + std::to_string(mAttributes.load.size());
        return mMetadata.c_str();
    });
}

int32_t MoeeFfn::setTactic(int32_t tactic) noexcept {
    return guarded("setTactic", kFailure, [&] {
        if (tactic != 0 && findTactic(tactic) == nullptr) {
            return fail("setTactic", "this library has no tactic " + std::to_string(tactic)
                    + ": the engine was built with another one; build it again");
        }
        mTactic = tactic;
        trace("trace set_tactic " + std::to_string(tactic));
        return 0;
    });
}

int32_t MoeeFfn::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*, int32_t nbOutputs) noexcept {
    return guarded("onShapeChange", kFailure, [&] {
        if (!countsFit("onShapeChange", nbInputs, nbOutputs)) {
            return kFailure;
        }
        std::string why;
        Sizes sizes;
        auto const shapes = shapesOf([&](int32_t i) { return in[i].dims; });
        if (!readSizes(shapes, in[kInX].type, mAttributes, false, sizes, why)) {
            return fail("onShapeChange", why);
        }
        if (mConfigured && !isBuild() && (sizes.type != mSizes.type || sizes.dim != mSizes.dim)) {
            return fail("onShapeChange", "the tensors do not match the engine's serialised type and width");
        }
        mSizes = sizes;
        mConfigured = true;
        trace("trace shape_change x=" + text(in[kInX].dims));
        // The builder times without attaching. It must not fail here either: engines are built without a GPU.
        if (mPrograms == nullptr && !prepare(why)) {
            trace("no kernels loaded: " + why);
        }
        return 0;
    });
}

bool MoeeFfn::prepare(std::string& why) {
    mPrograms = Programs::load(mSizes, mAttributes, isBuild() && !mAttributes.load.empty(), why);
    return mPrograms != nullptr;
}

int32_t MoeeFfn::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
    void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    return guarded("enqueue", kFailure, [&] {
        if (mPrograms == nullptr) {
            return fail("enqueue", "no kernels are loaded; attachToContext or onShapeChange must come first");
        }
        std::string why;
        Sizes sizes;
        auto const shapes = shapesOf([&](int32_t i) { return inputDesc[i].dims; });
        if (!readSizes(shapes, inputDesc[kInX].type, mAttributes, false, sizes, why)) {
            return fail("enqueue", why);
        }
        if (sizes.type != mSizes.type) {
            return fail("enqueue", "the tokens' type differs from the one that kernels were loaded for");
        }
        if (sizes.tokens == 0) {
            return 0;
        }
        Program const* const program = mPrograms->choose(mTactic, sizes);
        if (program == nullptr) {
            return fail("enqueue", "tactic " + std::to_string(mTactic) + " does not fit this layer or device");
        }
        Pointers const pointers{inputs, outputs[0], workspace};
        if (!enqueueProgram(*mPrograms, *program, sizes, pointers, reinterpret_cast<CuStream>(stream), why)) {
            return fail("enqueue", why);
        }
        return 0;
    });
}

IPluginV3* MoeeFfn::attachToContext(IPluginResourceContext*) noexcept {
    return guarded("attachToContext", static_cast<IPluginV3*>(nullptr), [&]() -> IPluginV3* {
        std::unique_ptr<MoeeFfn> attached(new MoeeFfn(*this));
        std::string why;
        if (!mConfigured) {
            fail("attachToContext", "the layer's shapes are not known; the engine is corrupt");
            return nullptr;
        }
        if (!attached->prepare(why)) {
            fail("attachToContext", why);
            return nullptr;
        }
        trace("trace attach");
        return attached.release();
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
        trace("trace serialize fields=" + std::to_string(mFields.size()));
        return static_cast<PluginFieldCollection const*>(&mCollection);
    });
}

}  // namespace moee
