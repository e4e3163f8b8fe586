// A stand-in for libnvinfer's runtime: an "engine" is a text of six numbers, `elements classes min max half plugin`. Its
// output k is the sum of the input's elements i with i % classes == k. `stubs.h` (written by the test from TensorRT's
// headers) fills in every method that the runner must not call.
#include "stubs.h"

#include "half.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;
using namespace nvinfer1::apiv;

namespace {

struct Spec {
    int elements, classes, low, high, half, plugin;
};

bool gPluginLoaded = false;

bool isInput(char const* name) { return std::strcmp(name, "input") == 0; }

class Context final : public StubExecutionContext {
public:
    explicit Context(Spec spec) : mSpec(spec) {}
    bool setInputShape(char const* name, Dims const& dims) noexcept override {
        mBatch = dims.d[0];
        return isInput(name) && dims.nbDims == 4 && mBatch >= mSpec.low && mBatch <= mSpec.high;
    }
    bool setTensorAddress(char const* name, void* data) noexcept override {
        (isInput(name) ? mInput : mOutput) = data;
        return true;
    }
    bool enqueueV3(cudaStream_t) noexcept override {
        if (mInput == nullptr || mOutput == nullptr || mBatch < 1) {
            return false;
        }
        for (int b = 0; b < mBatch; ++b) {
            std::vector<float> sums(static_cast<size_t>(mSpec.classes), 0.0F);
            for (int i = 0; i < mSpec.elements; ++i) {
                int const at = b * mSpec.elements + i;
                sums[static_cast<size_t>(i % mSpec.classes)]
                    += mSpec.half ? moee::fromHalf(static_cast<uint16_t*>(mInput)[at]) : static_cast<float*>(mInput)[at];
            }
            for (int k = 0; k < mSpec.classes; ++k) {
                int const at = b * mSpec.classes + k;
                if (mSpec.half) {
                    static_cast<uint16_t*>(mOutput)[at] = moee::toHalf(sums[static_cast<size_t>(k)]);
                } else {
                    static_cast<float*>(mOutput)[at] = sums[static_cast<size_t>(k)];
                }
            }
        }
        return true;
    }

private:
    Spec mSpec;
    int64_t mBatch{0};
    void* mInput{nullptr};
    void* mOutput{nullptr};
};

// The public classes hold a pointer to the implementation, which they delete neither.
class PublicContext final : public IExecutionContext {
public:
    explicit PublicContext(Spec spec) : context(spec) { mImpl = &context; }
    Context context;
};

class EngineImpl final : public StubCudaEngine {
public:
    explicit EngineImpl(Spec spec) : mSpec(spec) {}
    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) noexcept override {
        return new PublicContext(mSpec);
    }
    int32_t getNbIOTensors() const noexcept override { return 2; }
    char const* getIOTensorName(int32_t index) const noexcept override { return index == 0 ? "input" : "output"; }
    TensorIOMode getTensorIOMode(char const* name) const noexcept override {
        return isInput(name) ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
    }
    DataType getTensorDataType(char const*) const noexcept override { return mSpec.half ? DataType::kHALF : DataType::kFLOAT; }
    Dims getTensorShape(char const* name) const noexcept override {
        int const side = static_cast<int>(std::lround(std::sqrt(mSpec.elements / 3.0)));
        return isInput(name) ? Dims{4, {-1, 3, side, side}} : Dims{2, {-1, mSpec.classes}};
    }
    Dims getProfileShape(char const* name, int32_t, OptProfileSelector which) const noexcept override {
        Dims shape = getTensorShape(name);
        shape.d[0] = which == OptProfileSelector::kMIN ? mSpec.low : mSpec.high;
        return shape;
    }

private:
    Spec mSpec;
};

class PublicEngine final : public ICudaEngine {
public:
    explicit PublicEngine(Spec spec) : engine(spec) { mImpl = &engine; }
    EngineImpl engine;
};

class Registry final : public StubPluginRegistry {
public:
    PluginLibraryHandle loadLibrary(AsciiChar const* path) noexcept override {
        gPluginLoaded = std::string(path).find("absent") == std::string::npos;
        return gPluginLoaded ? this : nullptr;
    }
};
Registry gRegistry;

class RuntimeImpl final : public StubRuntime {
public:
    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
        std::string const text(static_cast<char const*>(blob), size);
        Spec s{};
        if (std::sscanf(text.c_str(), "%d %d %d %d %d %d", &s.elements, &s.classes, &s.low, &s.high, &s.half, &s.plugin) != 6) {
            logger->log(ILogger::Severity::kERROR, "not an engine");
            return nullptr;
        }
        if (s.plugin && !gPluginLoaded) {
            logger->log(ILogger::Severity::kERROR, "could not find plugin MoeeFfn");
            return nullptr;
        }
        return new PublicEngine(s);
    }
    IPluginRegistry& getPluginRegistry() noexcept override { return gRegistry; }
    ILogger* logger{nullptr};
};

class PublicRuntime final : public IRuntime {
public:
    explicit PublicRuntime(ILogger* logger) {
        runtime.logger = logger;
        mImpl = &runtime;
    }
    RuntimeImpl runtime;
};

}  // namespace

extern "C" void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
    return version == NV_TENSORRT_VERSION ? new PublicRuntime(static_cast<ILogger*>(logger)) : nullptr;
}
