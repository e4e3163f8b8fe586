// The operator moee::MoeeFfn as C++ sees it: attributes, inputs, sizes. `plugins/contract.py` is the source; a test
// compares the two.
#pragma once

#include "operator/tables.h"

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace moee {

constexpr char const* kPluginName = "MoeeFfn";
constexpr char const* kPluginVersion = "1";
constexpr char const* kPluginNamespace = "";

enum Input : int32_t { kInX, kInRouter, kInRouterBias, kInWUp, kInBUp, kInWDown, kInBOut, kInNeurons, kInOffsets };
constexpr int32_t kInputs = 9;
constexpr int32_t kOutputs = 1;

constexpr std::array<char const*, 5> kActivations{"gelu", "gelu_tanh", "relu", "silu", "quick_gelu"};  // the kernels' codes
constexpr int32_t kDimMultiple = 16;  // of D, so that every row starts on a 16-byte boundary

struct Attributes {
    int32_t activation{0};  // index into kActivations
    int32_t topK{1};
    int32_t maxWidth{0};
    std::vector<int32_t> load;  // tokens an expert, parts per million; empty means uniform. Build phase only
    int32_t code{0};  // SM whose PTX alone runs, as the self-test asks for it; 0: the best kernels for the device
};

// Everything that one call depends on, beside the pointers.
struct Sizes {
    int64_t tokens{0};  // T, product of all leading dimensions of x
    int32_t dim{0};     // D
    int32_t experts{0};
    int32_t unionSize{0};
    int32_t maxWidth{0};
    int32_t topK{1};
    int32_t activation{0};
    Type type{Type::kFloat32};
};

// The token type of a TensorRT type; false for a type that the operator does not take.
bool tokenType(nvinfer1::DataType from, Type& to);
char const* typeName(Type type);
size_t typeBytes(Type type);

// Reads attributes from a creator's fields. False with one sentence for a field that is missing, of the wrong type or
// length, or out of range.
bool readAttributes(nvinfer1::PluginFieldCollection const* fields, Attributes& out, std::string& why);

// The one int32 of field `name`; false if there is no such field or it is malformed.
bool readInt(nvinfer1::PluginFieldCollection const* fields, char const* name, int32_t& out);

// Checks the nine input shapes against the contract and each other. With `anyTokens`, leading dimensions of x may be
// -1 (not known yet); they then count as 0 tokens.
bool readSizes(std::array<nvinfer1::Dims, kInputs> const& shapes, nvinfer1::DataType type, Attributes const& attributes,
    bool anyTokens, Sizes& out, std::string& why);

}  // namespace moee
