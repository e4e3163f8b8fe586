// IEEE half precision on the host, for engines whose input or output is float16 and for the self-test.
#pragma once

#include <cstdint>
#include <cstring>

namespace moee {

// Rounds to nearest, ties to even; overflow becomes infinity.
inline uint16_t toHalf(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    auto const sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
    bits &= 0x7fffffffU;
    if (bits >= 0x7f800000U) {
        return static_cast<uint16_t>(sign | 0x7c00U | (bits > 0x7f800000U ? 0x200U : 0U));
    }
    if (bits >= 0x477ff000U) {  // rounds to 65536 or more
        return static_cast<uint16_t>(sign | 0x7c00U);
    }
    if (bits < 0x38800000U) {  // subnormal: add a float whose last place is half's smallest step
        float magnitude;
        std::memcpy(&magnitude, &bits, sizeof(bits));
        magnitude += 0.5F;
        std::memcpy(&bits, &magnitude, sizeof(bits));
        return static_cast<uint16_t>(sign | (bits - 0x3f000000U));
    }
    bits += 0xfffU + ((bits >> 13) & 1U);
    return static_cast<uint16_t>(sign | ((bits - 0x38000000U) >> 13));
}

inline float fromHalf(uint16_t half) {
    uint32_t const sign = (half & 0x8000U) << 16;
    uint32_t const rest = half & 0x7fffU;
    uint32_t bits;
    float value;
    if (rest < 0x400U) {  // zero or subnormal
        value = static_cast<float>(rest) * 5.9604644775390625e-8F;
        std::memcpy(&bits, &value, sizeof(bits));
    } else {
        bits = (rest << 13) + (rest >= 0x7c00U ? 0x70000000U : 0x38000000U);
    }
    bits |= sign;
    std::memcpy(&value, &bits, sizeof(bits));
    return value;
}

}  // namespace moee
