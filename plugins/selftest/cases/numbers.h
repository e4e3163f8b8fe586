// Token types on the host: float16 and bfloat16 to float and back, whole tensors to bytes.
#pragma once

#include "half.h"
#include "operator/operator.h"

#include <cstdint>
#include <cstring>
#include <vector>

namespace selftest {

using moee::fromHalf;
using moee::toHalf;

inline float fromBfloat(uint16_t bits) {
    uint32_t const wide = static_cast<uint32_t>(bits) << 16;
    float value = 0;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}

// Rounds to nearest, ties to even.
inline uint16_t toBfloat(float value) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    bool const isNan = (bits & 0x7fffffffU) > 0x7f800000U;
    return static_cast<uint16_t>(isNan ? (bits >> 16) | 0x40U : (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

inline void storeAt(unsigned char* bytes, size_t index, float value, moee::Type type) {
    if (type == moee::Type::kFloat32) {
        std::memcpy(bytes + 4 * index, &value, 4);
        return;
    }
    uint16_t const bits = type == moee::Type::kFloat16 ? toHalf(value) : toBfloat(value);
    std::memcpy(bytes + 2 * index, &bits, 2);
}

inline std::vector<unsigned char> toBytes(float const* values, size_t count, moee::Type type) {
    std::vector<unsigned char> out(count * moee::typeBytes(type));
    for (size_t i = 0; i < count; ++i) {
        storeAt(out.data(), i, values[i], type);
    }
    return out;
}

inline float valueAt(unsigned char const* bytes, size_t index, moee::Type type) {
    if (type == moee::Type::kFloat32) {
        float value = 0;
        std::memcpy(&value, bytes + 4 * index, 4);
        return value;
    }
    uint16_t bits = 0;
    std::memcpy(&bits, bytes + 2 * index, 2);
    return type == moee::Type::kFloat16 ? fromHalf(bits) : fromBfloat(bits);
}

}  // namespace selftest
