// Shared by the plugin's source files: no exception leaves a method, errors are logged with the method's name.
#pragma once

#include "tensorrt/log.h"
#include "operator/operator.h"

#include <algorithm>
#include <array>
#include <exception>
#include <string>

namespace moee {

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

inline int32_t fail(char const* method, std::string const& why) {
    logError(std::string("MoeeFfn ") + method + ": " + why);
    return kFailure;
}

inline bool countsFit(char const* method, int32_t inputs, int32_t outputs) {
    if (inputs == kInputs && outputs == kOutputs) {
        return true;
    }
    fail(method, "expected 9 inputs and 1 output; came " + std::to_string(inputs) + " and " + std::to_string(outputs));
    return false;
}

// The nine input shapes, by a function from index to shape.
template <typename Get>
std::array<nvinfer1::Dims, kInputs> shapesOf(Get&& get) {
    std::array<nvinfer1::Dims, kInputs> shapes{};
    for (int32_t i = 0; i < kInputs; ++i) {
        shapes[static_cast<size_t>(i)] = get(i);
    }
    return shapes;
}

inline std::string shapeText(nvinfer1::Dims const& dims) {
    std::string out = "[";
    for (int32_t i = 0; i < std::min(dims.nbDims, nvinfer1::Dims::MAX_DIMS); ++i) {
        out += (i > 0 ? "," : "") + std::to_string(dims.d[i]);
    }
    return out + "]";
}

}  // namespace moee
