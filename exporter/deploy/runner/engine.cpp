#include "engine.h"

#include "half.h"

#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace moee {
namespace {

using Create = void* (*)(void*, int32_t);

Create findCreate(std::string const& library) {
    std::vector<std::string> names{"libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR)};
    if (!library.empty()) {
        names = {library};
    }
    // Global scope: plugins look TensorRT's symbols up there.
    for (std::string const& name : names) {
        if (void* const handle = dlopen(name.c_str(), RTLD_NOW | RTLD_GLOBAL)) {
            if (void* const symbol = dlsym(handle, "createInferRuntime_INTERNAL")) {
                return reinterpret_cast<Create>(symbol);
            }
        }
    }
    throw std::runtime_error(names[0] + " cannot be opened: install TensorRT " + std::to_string(NV_TENSORRT_MAJOR)
        + ", which this program was compiled for, or give its path with --tensorrt");
}

bool isHalf(nvinfer1::DataType type, std::string const& name) {
    if (type != nvinfer1::DataType::kFLOAT && type != nvinfer1::DataType::kHALF) {
        throw std::runtime_error("tensor " + name + " is neither float32 nor float16");
    }
    return type == nvinfer1::DataType::kHALF;
}

size_t elements(nvinfer1::Dims const& shape, std::string const& name) {
    size_t count = 1;
    for (int i = 1; i < shape.nbDims; ++i) {
        if (shape.d[i] <= 0) {
            throw std::runtime_error("tensor " + name + " has a dynamic dimension beside the batch");
        }
        count *= static_cast<size_t>(shape.d[i]);
    }
    return count;
}

}  // namespace

void Engine::Logger::log(Severity severity, char const* text) noexcept {
    if (severity <= Severity::kERROR) {
        std::fprintf(stderr, "TensorRT: %s\n", text);
        try {
            errors += std::string(errors.empty() ? "" : "; ") + text;
        } catch (...) {
            // out of memory: the line above was printed
        }
    }
}

void Engine::fail(std::string const& what) const {
    throw std::runtime_error(mLogger.errors.empty() ? what : what + ": " + mLogger.errors);
}

Engine::Engine(std::string const& path, std::string const& plugin, std::string const& library, Device& device) : mDevice(device) {
    std::ifstream in(path, std::ios::binary);
    if (!in) {
        throw std::runtime_error(path + " cannot be read; build.sh makes it");
    }
    std::vector<char> const plan{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    mRuntime.reset(static_cast<nvinfer1::IRuntime*>(findCreate(library)(&mLogger, NV_TENSORRT_VERSION)));
    if (!mRuntime) {
        fail("TensorRT made no runtime");
    }
    if (!plugin.empty() && mRuntime->getPluginRegistry().loadLibrary(plugin.c_str()) == nullptr) {
        fail(plugin + " was not loaded");
    }
    mEngine.reset(mRuntime->deserializeCudaEngine(plan.data(), plan.size()));
    if (!mEngine) {
        fail(path + " was not loaded; it must be built by this TensorRT on this kind of GPU, and its plugin given with --plugin");
    }
    mContext.reset(mEngine->createExecutionContext());
    if (!mContext) {
        fail("no execution context");
    }
    describe();
}

void Engine::describe() {
    for (int i = 0; i < mEngine->getNbIOTensors(); ++i) {
        std::string const name = mEngine->getIOTensorName(i);
        bool const input = mEngine->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT;
        std::string& kept = input ? mInputName : mOutputName;
        if (!kept.empty()) {
            throw std::runtime_error(std::string("the engine has more than one ") + (input ? "input" : "output"));
        }
        kept = name;
        (input ? mHalfInput : mHalfOutput) = isHalf(mEngine->getTensorDataType(name.c_str()), name);
        (input ? mInputElements : mOutputElements) = elements(mEngine->getTensorShape(name.c_str()), name);
    }
    if (mInputName.empty() || mOutputName.empty()) {
        throw std::runtime_error("the engine lacks an input or an output");
    }
    auto const bound = [&](nvinfer1::OptProfileSelector which) {
        return static_cast<int>(mEngine->getProfileShape(mInputName.c_str(), 0, which).d[0]);
    };
    mMinBatch = bound(nvinfer1::OptProfileSelector::kMIN);
    mMaxBatch = bound(nvinfer1::OptProfileSelector::kMAX);
    mInput = std::make_unique<Buffer>(sizeof(float) * static_cast<size_t>(mMaxBatch) * mInputElements);
    mOutput = std::make_unique<Buffer>(sizeof(float) * static_cast<size_t>(mMaxBatch) * mOutputElements);
}

void Engine::setInput(std::vector<float> const& images, int batch) {
    if (batch < mMinBatch || batch > mMaxBatch) {
        throw std::runtime_error("batch " + std::to_string(batch) + " is outside the engine's profile, " + std::to_string(mMinBatch)
            + " to " + std::to_string(mMaxBatch));
    }
    if (images.size() != static_cast<size_t>(batch) * mInputElements) {
        throw std::runtime_error("the input holds " + std::to_string(images.size()) + " values, the engine takes "
            + std::to_string(mInputElements) + " an image");
    }
    if (mHalfInput) {
        std::vector<uint16_t> halves(images.size());
        for (size_t i = 0; i < images.size(); ++i) {
            halves[i] = toHalf(images[i]);
        }
        mDevice.upload(mInput->address(), halves.data(), halves.size() * sizeof(uint16_t));
        mDevice.synchronise();
    } else {
        mDevice.upload(mInput->address(), images.data(), images.size() * sizeof(float));
        mDevice.synchronise();
    }
    nvinfer1::Dims shape = mEngine->getTensorShape(mInputName.c_str());
    shape.d[0] = batch;
    if (!mContext->setInputShape(mInputName.c_str(), shape) || !mContext->setTensorAddress(mInputName.c_str(), mInput->pointer())
        || !mContext->setTensorAddress(mOutputName.c_str(), mOutput->pointer())) {
        fail("the input was refused");
    }
    mBatch = batch;
}

double Engine::run() {
    auto const start = std::chrono::steady_clock::now();
    if (!mContext->enqueueV3(mDevice.stream())) {
        fail("the engine did not run");
    }
    mDevice.synchronise();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

std::vector<float> Engine::output() {
    std::vector<float> values(static_cast<size_t>(mBatch) * mOutputElements);
    if (!mHalfOutput) {
        mDevice.download(values.data(), mOutput->address(), values.size() * sizeof(float));
        mDevice.synchronise();
        return values;
    }
    std::vector<uint16_t> halves(values.size());
    mDevice.download(halves.data(), mOutput->address(), halves.size() * sizeof(uint16_t));
    mDevice.synchronise();
    for (size_t i = 0; i < values.size(); ++i) {
        values[i] = fromHalf(halves[i]);
    }
    return values;
}

}  // namespace moee
