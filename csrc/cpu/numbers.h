// The number formats of weights and caches, and their scalar conversions.
//
// Functions are static, not inline: every isa_*.cpp includes this with its own compiler flags, and the linker must not
// pick one copy, compiled for AVX-512, for all.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../program.h"

namespace skipkernels {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

static inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float to_float(float value) { return value; }
static inline float to_float(bf16 value) { return bits_to_float(uint32_t{value.bits} << 16); }
static inline float to_float(fp16 value) {
    const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // scaling by 2^112 turns the fp16 exponent into a float's and makes subnormals come out right
    return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

// Round to nearest, ties to even: the same as torch's conversion.
static inline void store_as(float* to, float value) { *to = value; }
static inline void store_as(bf16* to, float value) {
    const uint32_t bits = float_to_bits(value);
    to->bits = std::isnan(value) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
static inline void store_as(fp16* to, float value) {
    const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u;
    const float magnitude = bits_to_float(bits & 0x7fffffffu);
    uint32_t half;
    if (std::isnan(value)) {
        half = 0x7e00;
    } else if (magnitude >= 65520.0f) {
        half = 0x7c00;
    } else if (magnitude < 0x1p-14f) {
        half = static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p24f));  // subnormal: a multiple of 2^-24
    } else {
        const uint32_t m = float_to_bits(magnitude);
        half = (m - 0x38000000u + 0xfffu + (m >> 13 & 1u)) >> 13;
    }
    to->bits = static_cast<uint16_t>(sign | half);
}

// f with a value of a float format's type; nothing for a format of blocks.
template <class F>
static inline void with_float_type(Format format, F f) {
    switch (format) {
        case Format::f32:
            return f(float{});
        case Format::bf16:
            return f(bf16{});
        case Format::f16:
            return f(fp16{});
        default:
            return;
    }
}

}  // namespace skipkernels
