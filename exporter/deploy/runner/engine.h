// A TensorRT engine with one image input and one output. libnvinfer is opened with dlopen, so only headers are needed.
#pragma once

#include "cuda.h"

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

namespace moee {

class Engine {
public:
    // Loads the plugin library (if given) and the engine. An engine is code: load only those that you built.
    // Throws std::runtime_error with TensorRT's last errors.
    Engine(std::string const& path, std::string const& plugin, std::string const& library, Device& device);

    int minBatch() const { return mMinBatch; }
    int maxBatch() const { return mMaxBatch; }
    size_t inputElements() const { return mInputElements; }    // of one image
    size_t outputElements() const { return mOutputElements; }  // of one image

    // Copies [batch, inputElements] to the device.
    void setInput(std::vector<float> const& images, int batch);
    // Runs once and waits for the end; milliseconds of the execution without the copies.
    double run();
    // [batch, outputElements] of the last run.
    std::vector<float> output();

private:
    class Logger final : public nvinfer1::ILogger {
    public:
        void log(Severity severity, char const* text) noexcept override;
        std::string errors;
    };
    [[noreturn]] void fail(std::string const& what) const;
    void describe();

    Device& mDevice;
    Logger mLogger;
    std::unique_ptr<nvinfer1::IRuntime> mRuntime;
    std::unique_ptr<nvinfer1::ICudaEngine> mEngine;
    std::unique_ptr<nvinfer1::IExecutionContext> mContext;
    std::unique_ptr<Buffer> mInput;
    std::unique_ptr<Buffer> mOutput;
    std::string mInputName;
    std::string mOutputName;
    bool mHalfInput{false};
    bool mHalfOutput{false};
    int mBatch{0};
    int mMinBatch{1};
    int mMaxBatch{1};
    size_t mInputElements{0};
    size_t mOutputElements{0};
};

}  // namespace moee
