#include "operator/operator.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace moee {
namespace {

using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

// Lengths come from files too: beyond these, the data are not looked at.
constexpr int32_t kMaxText = 64;
constexpr int32_t kMaxExperts = 65536;
constexpr int32_t kMillion = 1000000;
constexpr int64_t kMaxElements = int64_t{1} << 40;  // of a workspace buffer: 4 TiB in float32

PluginField const* findField(PluginFieldCollection const* fields, char const* name) {
    if (fields == nullptr || fields->fields == nullptr) {
        return nullptr;
    }
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        if (fields->fields[i].name != nullptr && std::strcmp(fields->fields[i].name, name) == 0) {
            return &fields->fields[i];
        }
    }
    return nullptr;
}

std::string came(PluginField const& field) {
    return "came type " + std::to_string(static_cast<int32_t>(field.type)) + ", length " + std::to_string(field.length);
}

// Fields come from files: the data pointer may have any alignment.
int32_t intAt(PluginField const& field, int32_t index) {
    int32_t value = 0;
    std::memcpy(&value, static_cast<char const*>(field.data) + sizeof(value) * static_cast<size_t>(index), sizeof(value));
    return value;
}

bool readPositive(PluginFieldCollection const* fields, char const* name, bool needed, int32_t& out, std::string& why) {
    PluginField const* const field = findField(fields, name);
    if (field == nullptr) {
        why = std::string("attribute ") + name + " is missing";
        return !needed;
    }
    if (field->type != PluginFieldType::kINT32 || field->length != 1 || field->data == nullptr) {
        why = std::string("attribute ") + name + " must be one int32; " + came(*field);
        return false;
    }
    out = intAt(*field, 0);
    if (out < 1) {
        why = std::string("attribute ") + name + " must be at least 1; came " + std::to_string(out);
        return false;
    }
    return true;
}

bool readActivation(PluginFieldCollection const* fields, int32_t& out, std::string& why) {
    PluginField const* const field = findField(fields, "activation");
    if (field == nullptr) {
        return true;  // the contract's default
    }
    if (field->type != PluginFieldType::kCHAR || field->length < 1 || field->length > kMaxText || field->data == nullptr) {
        why = "attribute activation must be a string; " + came(*field);
        return false;
    }
    std::string text(static_cast<char const*>(field->data), static_cast<size_t>(field->length));
    text.resize(std::strlen(text.c_str()));  // parsers differ in whether the length counts a final zero
    for (size_t i = 0; i < kActivations.size(); ++i) {
        if (text == kActivations[i]) {
            out = static_cast<int32_t>(i);
            return true;
        }
    }
    why = "attribute activation must be one of";
    for (char const* const known : kActivations) {
        why += std::string(known == kActivations.front() ? " " : ", ") + known;
    }
    why += "; came \"" + text.substr(0, 32) + "\"";
    return false;
}

bool readLoad(PluginFieldCollection const* fields, std::vector<int32_t>& out, std::string& why) {
    PluginField const* const field = findField(fields, "load");
    out.clear();
    if (field == nullptr || field->length == 0) {
        return true;
    }
    if (field->type != PluginFieldType::kINT32 || field->length < 0 || field->length > kMaxExperts || field->data == nullptr) {
        why = "attribute load must be a list of int32; " + came(*field);
        return false;
    }
    int64_t sum = 0;
    for (int32_t i = 0; i < field->length; ++i) {
        int32_t const share = intAt(*field, i);
        if (share < 0 || share > kMillion) {
            why = std::string("attribute load must not be ") + (share < 0 ? "negative" : "above a million") + "; came "
                + std::to_string(share) + " at " + std::to_string(i);
            return false;
        }
        out.push_back(share);
        sum += share;
    }
    why = "attribute load must not be all zero";
    return sum > 0;
}

std::string text(Dims const& dims) {
    std::string out = "[";
    for (int32_t i = 0; i < dims.nbDims && i < Dims::MAX_DIMS; ++i) {
        out += (i > 0 ? ", " : "") + std::to_string(dims.d[i]);
    }
    return out + (dims.nbDims > Dims::MAX_DIMS ? ", ...]" : "]");
}

// Whether every buffer of the workspace keeps to `kMaxElements`, so that no product of sizes overflows.
bool fits(Sizes const& s) {
    int64_t const slots = s.tokens * s.topK;
    int64_t const width = std::max({s.unionSize, s.dim, s.maxWidth}) + int64_t{16};
    return slots <= kMaxElements / width && s.experts <= kMaxElements / std::max<int64_t>({s.tokens, s.unionSize, 1});
}

bool isShape(Dims const& dims, int64_t first, int64_t second = 0) {
    return second == 0 ? dims.nbDims == 1 && dims.d[0] == first
                       : dims.nbDims == 2 && dims.d[0] == first && dims.d[1] == second;
}

}  // namespace

bool tokenType(nvinfer1::DataType from, Type& to) {
    switch (from) {
    case nvinfer1::DataType::kFLOAT: to = Type::kFloat32; return true;
    case nvinfer1::DataType::kHALF: to = Type::kFloat16; return true;
    case nvinfer1::DataType::kBF16: to = Type::kBfloat16; return true;
    default: return false;
    }
}

char const* typeName(Type type) {
    return type == Type::kFloat32 ? "float32" : type == Type::kFloat16 ? "float16" : "bfloat16";
}

size_t typeBytes(Type type) { return type == Type::kFloat32 ? 4 : 2; }

bool readAttributes(PluginFieldCollection const* fields, Attributes& out, std::string& why) {
    if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr)) {
        why = "the attribute list is null or malformed";
        return false;
    }
    return readActivation(fields, out.activation, why) && readPositive(fields, "top_k", false, out.topK, why)
        && readPositive(fields, "max_width", true, out.maxWidth, why) && readLoad(fields, out.load, why);
}

bool readInt(PluginFieldCollection const* fields, char const* name, int32_t& out) {
    PluginField const* const field = findField(fields, name);
    if (field == nullptr || field->type != PluginFieldType::kINT32 || field->length != 1 || field->data == nullptr) {
        return false;
    }
    out = intAt(*field, 0);
    return true;
}

bool readSizes(std::array<Dims, kInputs> const& shapes, nvinfer1::DataType type, Attributes const& attributes,
    bool anyTokens, Sizes& out, std::string& why) {
    Dims const& x = shapes[kInX];
    Dims const& router = shapes[kInRouter];
    Dims const& up = shapes[kInWUp];
    if (!tokenType(type, out.type)) {
        why = "x must be float32, float16 or bfloat16; came TensorRT type " + std::to_string(static_cast<int32_t>(type));
        return false;
    }
    if (x.nbDims < 2 || x.nbDims > Dims::MAX_DIMS || router.nbDims != 2 || up.nbDims != 2) {
        why = "x must be [..., D] of rank 2 or more, router [K, D] and w_up [U, D]; came " + text(x) + ", " + text(router)
            + " and " + text(up);
        return false;
    }
    int64_t const dim = x.d[x.nbDims - 1];
    int64_t const experts = router.d[0];
    int64_t const unionSize = up.d[0];
    constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
    if (dim < 1 || dim % kDimMultiple != 0 || dim > kLimit || experts < 1 || experts > kLimit || unionSize < 1
        || unionSize > kLimit) {
        why = "D must be a known multiple of 16, K and U known and positive; came x " + text(x) + ", router "
            + text(router) + ", w_up " + text(up);
        return false;
    }
    struct Expected {
        Input input;
        char const* name;
        int64_t first, second;
    };
    for (auto const& e : {Expected{kInRouter, "router", experts, dim}, Expected{kInRouterBias, "router_bias", experts, 0},
             Expected{kInWUp, "w_up", unionSize, dim}, Expected{kInBUp, "b_up", unionSize, 0},
             Expected{kInWDown, "w_down", unionSize, dim}, Expected{kInBOut, "b_out", experts, dim},
             Expected{kInOffsets, "offsets", experts + 1, 0}}) {
        if (!isShape(shapes[e.input], e.first, e.second)) {
            why = std::string(e.name) + " must be [" + std::to_string(e.first)
                + (e.second != 0 ? ", " + std::to_string(e.second) : "") + "]; came " + text(shapes[e.input]);
            return false;
        }
    }
    if (shapes[kInNeurons].nbDims != 1 || shapes[kInNeurons].d[0] < 1) {
        why = "neurons must be a known, non-empty vector; came " + text(shapes[kInNeurons]);
        return false;
    }
    if (attributes.maxWidth > unionSize) {
        why = "max_width is " + std::to_string(attributes.maxWidth) + ", but w_up has only " + std::to_string(unionSize)
            + " neurons";
        return false;
    }
    if (attributes.topK > experts) {
        why = "top_k is " + std::to_string(attributes.topK) + ", but there are only " + std::to_string(experts) + " experts";
        return false;
    }
    if (!attributes.load.empty() && static_cast<int64_t>(attributes.load.size()) != experts) {
        why = "load has " + std::to_string(attributes.load.size()) + " entries, but there are " + std::to_string(experts)
            + " experts";
        return false;
    }
    int64_t tokens = 1;
    for (int32_t i = 0; i + 1 < x.nbDims; ++i) {
        if (x.d[i] < 0 && !anyTokens) {
            why = "x has unknown dimensions: " + text(x);
            return false;
        }
        bool const none = x.d[i] < 0 || tokens == 0;
        tokens = none ? 0 : x.d[i] > kLimit ? kLimit + 1 : tokens * x.d[i];
        if (tokens > kLimit / attributes.topK) {  // slots are 32-bit in the kernels
            why = "x has too many tokens: " + text(x) + "; lower the batch size";
            return false;
        }
    }
    out.tokens = tokens;
    out.dim = static_cast<int32_t>(dim);
    out.experts = static_cast<int32_t>(experts);
    out.unionSize = static_cast<int32_t>(unionSize);
    out.maxWidth = attributes.maxWidth;
    out.topK = attributes.topK;
    out.activation = attributes.activation;
    if (!fits(out)) {
        why = "the layer is too large: " + std::to_string(tokens) + " tokens, top_k " + std::to_string(out.topK) + ", router "
            + text(router) + ", w_up " + text(up) + "; lower the batch size";
        return false;
    }
    return true;
}

}  // namespace moee
