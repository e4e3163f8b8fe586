// Build phase: shapes, formats, workspace, tactics.
#include "plugin/plugin.h"
#include "plugin/support.h"

#include <cstdio>

namespace moee {
namespace {

using namespace nvinfer1;

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

}  // namespace

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
        trace([&] {
            return "trace configure x=" + shapeText(shapes[kInX]) + " type=" + typeName(sizes.type)
                + " experts=" + std::to_string(sizes.experts) + " union=" + std::to_string(sizes.unionSize)
                + " max_width=" + std::to_string(sizes.maxWidth);
        });
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
        trace([&] { return "trace shapes rank=" + std::to_string(inputs[kInX].nbDims); });
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
        trace([&] {
            return "trace format pos=" + std::to_string(pos) + " type=" + std::to_string(static_cast<int32_t>(desc.type))
                + " format=" + std::to_string(static_cast<int32_t>(desc.format)) + " -> " + (supported ? "yes" : "no");
        });
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
            Sizes most = sizes;
            most.tokens = mostTokens(*tactic, sizes.tokens);
            bytes = std::max(bytes, layOut(most, kindOf(*tactic)).bytes);
        }
        trace([&] { return "trace workspace tokens=" + std::to_string(sizes.tokens) + " bytes=" + std::to_string(bytes); });
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
        std::transform(valid.begin(), valid.end(), tactics, [](Tactic const* tactic) { return tactic->id; });
        trace([&] {
            std::string text = "trace tactics ";
            for (size_t i = 0; i < valid.size(); ++i) {
                text += (i > 0 ? "," : "") + std::to_string(valid[i]->id);
            }
            return text;
        });
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
        trace([&] { return "trace timing_cache " + mTimingCacheId; });
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

}  // namespace moee
