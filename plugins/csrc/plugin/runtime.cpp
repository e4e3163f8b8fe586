// Runtime: tactic, shapes, kernels, launches. Also how the builder times tactics.
#include "cuda/launch.h"
#include "plugin/plugin.h"
#include "plugin/support.h"

namespace moee {

using namespace nvinfer1;

int32_t MoeeFfn::setTactic(int32_t tactic) noexcept {
    return guarded("setTactic", kFailure, [&] {
        if (tactic != 0 && findTactic(tactic) == nullptr) {
            return fail("setTactic", "this library has no tactic " + std::to_string(tactic)
                    + ": the engine was built with another one; build it again");
        }
        mTactic = tactic;
        trace([&] { return "trace set_tactic " + std::to_string(tactic); });
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
        // TensorRT also calls this when only an address changed: no message then, it is on the path of every inference.
        bool const changed = isBuild() || sizes.tokens != mSizes.tokens;
        mSizes = sizes;
        mConfigured = true;
        if (changed) {
            trace([&] { return "trace shape_change x=" + shapeText(in[kInX].dims); });
        }
        // The builder times without attaching. It must not fail here either: engines are built without a GPU.
        if (mPrograms == nullptr && !prepare(why)) {
            trace([&] { return "no kernels loaded: " + why; });
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
        if (sizes.type != mSizes.type || sizes.dim != mSizes.dim) {
            return fail("enqueue", "the tokens' type or width differs from the one that kernels were loaded for");
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
        trace([&] { return "trace attach"; });
        return attached.release();
    });
}

}  // namespace moee
