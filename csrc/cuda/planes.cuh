// The pieces of blocks in planes that a thread reads, and their codes as numbers.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "planes.h"

namespace skipkernels::cuda {

struct Planes {
    const char *words, *high, *scales, *supers;
    int groups;  // of a row

    Planes() = default;
    Planes(const void* data, Format format, int64_t rows, int64_t columns) : words(static_cast<const char*>(data)) {
        const PlaneOffsets at(format, rows, columns);
        high = words + at.high, scales = words + at.scales, supers = words + at.supers;
        groups = static_cast<int>(at.groups);
    }
};

// Numbers of 8 bits, e4m3, in the lower bytes of two halves, as bf16, which holds them: their other bits, put in its
// places, have an exponent less 127 and not less 7.
__device__ __forceinline__ uint32_t e4m3_to_bf16(uint32_t pair) {
    constexpr uint32_t kTwoTo120 = 0x7b807b80u;
    return ptx::multiply_bf16x2((pair & 0x007f007fu) << 4 | (pair & 0x00800080u) << 8, kTwoTo120);
}

// What a lane has of a group of a row, in registers.
template <Format kFormat>
struct LanePiece {
    static constexpr PlaneTraits kTraits = plane_traits(kFormat);
    static constexpr int kSuperBytes = kTraits.super_bytes() ? 4 : 0;  // the least that is copied
    static constexpr int kBytes = 16 * kTraits.units() + kTraits.scale_bytes() + kTraits.high_bytes() + kSuperBytes;

    uint4 words[kTraits.units()];
    uint32_t scales[kTraits.scale_bytes() / 4], high[2], numbers;

    // Begins to copy lane `t`'s piece of (row, group) to shared memory, of which every part has a run for all threads.
    static __device__ __forceinline__ void copy(char* to, int thread, int threads, const Planes& from, int64_t row,
                                                int group, int t, uint64_t policy) {
        const int64_t at = row * from.groups + group;
#pragma unroll
        for (int u = 0; u < kTraits.units(); ++u) {
            ptx::copy_weights_async(to + thread * 16, from.words + ((at * kTraits.units() + u) * 4 + t) * 16, policy);
            to += threads * 16;
        }
        constexpr int kScales = kTraits.scale_bytes(), kHigh = kTraits.high_bytes();
        ptx::copy_few_async<kScales>(to + thread * kScales, from.scales + at * kScales);
        to += threads * kScales;
        if constexpr (kHigh > 0) {
            ptx::copy_few_async<kHigh>(to + thread * kHigh, from.high + (at * 4 + t) * kHigh);
            to += threads * kHigh;
        }
        if constexpr (kSuperBytes > 0) {
            const int64_t of_super = super_index(from, row, group) * kTraits.super_bytes();
            ptx::copy_few_async<4>(to + thread * 4, from.supers + of_super / 4 * 4);
        }
    }

    __device__ __forceinline__ LanePiece(const char* from, int thread, int threads, bool odd_super) {
#pragma unroll
        for (uint4& word : words) {
            word = reinterpret_cast<const uint4*>(from)[thread];
            from += threads * 16;
        }
        load<kTraits.scale_bytes() / 4>(scales, from, thread);
        from += threads * kTraits.scale_bytes();
        if constexpr (kTraits.high_bits > 0) {
            load<kTraits.high_bits>(high, from, thread);
            from += threads * kTraits.high_bytes();
        }
        if constexpr (kSuperBytes > 0) {
            numbers = reinterpret_cast<const uint32_t*>(from)[thread];
            if (kTraits.scales == PlaneScales::q6_k && odd_super) numbers >>= 16;
        }
    }
    static __device__ __forceinline__ int64_t super_index(const Planes& from, int64_t row, int group) {
        return row * (from.groups / 2) + group / 2;
    }

    // The lane's 4 codes of half a block, as pairs of bf16 without rounding: 128 + a code of up to 7 bits is a bf16.
    __device__ __forceinline__ uint2 codes(int j, int half) const {
        uint32_t pair[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int p = half * 2 + i;
            if constexpr (kTraits.scales == PlaneScales::group) {
                pair[i] = e4m3_to_bf16(word(words[half], j) >> i * 8);
            } else if constexpr (kTraits.word_codes == 4) {
                const uint32_t bytes = word(words[half], j) >> i * 8;
                // -128 where the sign is not set, -256 where it is
                pair[i] = ptx::add_bf16x2((bytes & 0x007f007fu) | 0x43004300u, (bytes & 0x00800080u) | 0xc300c300u);
            } else {
                uint32_t code = word(words[0], j) >> p * 4 & 0x000f000fu;
                if constexpr (kTraits.high_bits == 1) {
                    const uint32_t bits = high[0] >> (j * 8 + p);
                    code |= (bits & 1u) << 4 | (bits & 0x10u) << 16;
                } else if constexpr (kTraits.high_bits == 2) {
                    const uint32_t bits = high[j / 2] >> (j % 2 * 16 + p * 2);
                    code |= (bits & 3u) << 4 | (bits & 0x300u) << 12;
                }
                pair[i] = ptx::add_bf16x2(code | 0x43004300u, 0xc300c300u | kTraits.offset * 0x10001u);
            }
        }
        return {pair[0], pair[1]};
    }

    // What codes of block j are multiplied with, in the first and the second half of its columns.
    __device__ __forceinline__ float scale(int j, int half) const {
        if constexpr (kTraits.scales == PlaneScales::group) {
            return __uint_as_float(scales[0]);
        } else if constexpr (kTraits.scales == PlaneScales::half) {
            return half_of(scales[j / 2], j % 2);
        } else if constexpr (kTraits.scales == PlaneScales::half_and_min) {
            return half_of(scales[j], 0);
        } else {
            const uint32_t bytes = scales[j / 2] >> j % 2 * 16;
            if constexpr (kTraits.scales == PlaneScales::k)
                return half_of(numbers, 0) * static_cast<float>(bytes & 255);
            return half_of(numbers, 0) * static_cast<float>(static_cast<int8_t>(bytes >> half * 8));
        }
    }
    // What is added.
    __device__ __forceinline__ float minimum(int j) const {
        if constexpr (kTraits.scales == PlaneScales::half_and_min) return half_of(scales[j], 1);
        if constexpr (kTraits.scales == PlaneScales::k) {
            return -(half_of(numbers, 1) * static_cast<float>(scales[j / 2] >> (j % 2 * 16 + 8) & 255));
        }
        return 0.0f;
    }

  private:
    static __device__ __forceinline__ uint32_t word(const uint4& v, int j) {
        return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
    }
    static __device__ __forceinline__ float half_of(uint32_t pair, int which) {
        return ptx::fp16_to_float(static_cast<uint16_t>(pair >> which * 16));
    }
    template <int kWords>
    static __device__ __forceinline__ void load(uint32_t* to, const char* from, int thread) {
        if constexpr (kWords == 4) {
            const uint4 v = reinterpret_cast<const uint4*>(from)[thread];
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        } else if constexpr (kWords == 2) {
            const uint2 v = reinterpret_cast<const uint2*>(from)[thread];
            to[0] = v.x, to[1] = v.y;
        } else {
            to[0] = reinterpret_cast<const uint32_t*>(from)[thread];
        }
    }
};

// One weight.
__device__ __forceinline__ float weight_at(const Planes& planes, Format format, int64_t row, int column) {
    const PlaneTraits traits = plane_traits(format);
    const int group = column / kGroupColumns, j = column / kBlockColumns % 4, half = column / 16 % 2;
    const int t = column / 4 % 4, i = column % 4;
    const int64_t at = row * planes.groups + group;
    const auto* scales = planes.scales + at * traits.scale_bytes();
    const auto half_at = [](const char* from, int64_t index) {
        return ptx::fp16_to_float(reinterpret_cast<const uint16_t*>(from)[index]);
    };
    int level;
    if (traits.word_codes == 4) {
        const int64_t byte = (((at * 2 + half) * 4 + t) * 4 + j) * 4 + i % 2 * 2 + i / 2;
        level = reinterpret_cast<const int8_t*>(planes.words)[byte];
    } else {
        const int64_t word = (at * 4 + t) * 4 + j;
        const int field = i % 2 * 4 + half * 2 + i / 2;
        level = reinterpret_cast<const uint32_t*>(planes.words)[word] >> field * 4 & 15;
        if (traits.high_bits == 1) level |= (planes.high[word] >> field & 1) << 4;
        if (traits.high_bits == 2)
            level |= (reinterpret_cast<const uint16_t*>(planes.high)[word] >> field * 2 & 3) << 4;
    }
    if (traits.scales == PlaneScales::group) {
        return ptx::bf16_to_float(static_cast<uint16_t>(e4m3_to_bf16(static_cast<uint32_t>(level)))) *
               *reinterpret_cast<const float*>(scales);
    }
    const auto code = static_cast<float>(level - traits.offset);
    const int64_t super = row * (planes.groups / 2) + group / 2;
    switch (traits.scales) {
        case PlaneScales::half:
            return code * half_at(scales, j);
        case PlaneScales::half_and_min:
            return code * half_at(scales, 2 * j) + half_at(scales, 2 * j + 1);
        case PlaneScales::k: {
            const float d = half_at(planes.supers, 2 * super) * static_cast<float>(static_cast<uint8_t>(scales[2 * j]));
            const float m = static_cast<float>(static_cast<uint8_t>(scales[2 * j + 1]));
            return code * d - half_at(planes.supers, 2 * super + 1) * m;
        }
        default:
            return code *
                   (half_at(planes.supers, super) * static_cast<float>(static_cast<int8_t>(scales[2 * j + half])));
    }
}

// f with a block format as a type's `value`.
template <class F>
cudaError_t with_block_format(Format format, F f) {
    switch (format) {
#define SKIPKERNELS_BLOCK_FORMAT(name) \
    case Format::name:                 \
        return f(std::integral_constant<Format, Format::name>{});
        SKIPKERNELS_BLOCK_FORMAT(q8_0)
        SKIPKERNELS_BLOCK_FORMAT(q4_0)
        SKIPKERNELS_BLOCK_FORMAT(q4_1)
        SKIPKERNELS_BLOCK_FORMAT(q5_0)
        SKIPKERNELS_BLOCK_FORMAT(q5_1)
        SKIPKERNELS_BLOCK_FORMAT(q4_k)
        SKIPKERNELS_BLOCK_FORMAT(q5_k)
        SKIPKERNELS_BLOCK_FORMAT(q6_k)
        SKIPKERNELS_BLOCK_FORMAT(f8_e4m3)
#undef SKIPKERNELS_BLOCK_FORMAT
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace skipkernels::cuda
