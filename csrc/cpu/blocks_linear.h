// The matrix kernel for quantised weights: groups of 16 rows (blocks.h) times activations in int8.
//
// A row of activations is quantised once, in blocks of 32 with an fp32 scale and the block's sums: what a code's offset
// or minimum contributes is a product with a sum. Inner products are integers, exact until a block's end; then they are
// scaled and added in fp32, block after block in order. So a row gets bitwise what it gets alone, and every instruction
// set multiplies the same integers.
//
// Without VNNI, products of bytes are added in pairs to 16 bits. Codes of 4 bits leave room for all eight quads of a
// block there (16 * 15 * 127 < 2^15), 5 bits for four, 6 bits for two; 8 bits go through sign and magnitude.
#pragma once

#include "blocks.h"
#include "each.h"
#include "int8_vec.h"
#include "kernels.h"
#include "rows_ahead.h"
#include "transpose.h"

namespace skipkernels::SKIPKERNELS_ISA {

using cpu::Scratch;

struct ActivationBlock {
    int8_t q[cpu::kBlockColumns];
    float scale, scaled_sum;  // x is about scale * q; scale * (sum of q)
    int32_t sums[2];          // of the first 16 q, and of the others
};
static_assert(sizeof(ActivationBlock) <= cpu::kBlockColumns * sizeof(float), "packed activations fit where floats do");

// Rows of activations computed together; their sums stay in registers.
constexpr int kMostTogether = Ints::lanes == 16 ? 8 : 4;
// Weights are prefetched into L2 this far ahead: groups follow each other without a gap, but the hardware's own
// prefetching stops at pages. The distance is a choice; runs differed more than 4, 8 and 16 KB did.
constexpr int64_t kAheadBytes = 8192;
constexpr float kSmallestActivation = 1e-30f;  // a block below it is zero: 127 / x would be infinite

// x[0..32) * factor * norm -> a block
inline void quantise_block(const float* x, float factor, const float* norm, ActivationBlock& out) {
    constexpr int kVecs = cpu::kBlockColumns / Vec::width;
    Vec values[kVecs], largest = splat(0.0f);
    for (int i = 0; i < kVecs; ++i) {
        values[i] = load(x + i * Vec::width) * splat(factor);
        if (norm) values[i] = values[i] * load(norm + i * Vec::width);
        largest = max(largest, abs(values[i]));
    }
    const float most = reduce_max(largest);
    const Vec inverse = splat(most >= kSmallestActivation ? 127.0f / most : 0.0f);
    for (int i = 0; i < kVecs; ++i) store_rounded(out.q + i * Vec::width, values[i] * inverse);
    int sums[2] = {0, 0};
    for (int i = 0; i < cpu::kBlockColumns; ++i) sums[i / 16] += out.q[i];
    out.scale = most / 127.0f;
    out.scaled_sum = out.scale * static_cast<float>(sums[0] + sums[1]);
    out.sums[0] = sums[0], out.sums[1] = sums[1];
}

inline int64_t activation_blocks(int64_t columns) { return columns / cpu::kBlockColumns; }

inline ActivationBlock* quantised_row(const Scratch& s, int64_t columns, int index) {
    return reinterpret_cast<ActivationBlock*>(s.x) + index * activation_blocks(columns);
}

// Rows [begin, end) of the list, each row of source times scale(row) * norm.
template <class Scale>
inline void quantise_rows(const float* source, int64_t columns, const float* norm, Scale scale, int begin, int end,
                          Scratch& s) {
    for (int i = begin; i < end; ++i) {
        const float* row = source + s.rows[i] * columns;
        const float factor = scale(row);
        ActivationBlock* out = quantised_row(s, columns, i);
        for (int64_t at = 0; at < columns; at += cpu::kBlockColumns) {
            quantise_block(row + at, factor, norm ? norm + at : nullptr, *out++);
        }
    }
}

// The codes of quad j of a block; `codes` is the block's first vector, at this half of the lanes.
template <int bits, int j>
inline Ints quad_of(const uint8_t* codes) {
    auto vector = [codes](int index) { return load_bytes(codes + index * cpu::kCodeVector); };
    if constexpr (bits == 8) {
        return vector(j);
    } else {
        const Ints low = and_bytes(shift < j<4 ? 0 : 4>(vector(j % 4)), 15);
        if constexpr (bits == 4) return low;
        if constexpr (bits == 5) return or_bytes(low, and_bytes(shift<j - 4>(vector(4)), 16));
        if constexpr (bits == 6) return or_bytes(low, and_bytes(shift<2 * (j % 4) - 4>(vector(4 + j / 4)), 48));
    }
}

// Vectors that hold a number of each of a group's rows.
constexpr int kHalves = cpu::kLanes / Ints::lanes;

// Sums of products of codes and activations, of N rows. Both halves of a group go together, so that a quad of
// activations is broadcast once.
template <int bits, int N>
struct Dots {
    Ints sums[kHalves][N];

    // both quads of a vector of 4-bit codes follow each other, so that it is loaded once; q6_k's halves have scales of
    // their own
    static constexpr int quad_at(int i) { return bits == 4 || bits == 5 ? i % 2 * 4 + i / 2 : i; }

    template <int j>
    static void load_quads(const uint8_t* codes, Ints (&quads)[kHalves]) {
        each<kHalves>([&](auto h) SKIPKERNELS_INLINE { quads[h] = quad_of<bits, j>(codes + 4 * h * Ints::lanes); });
    }

#if defined(SKIPKERNELS_ISA_VNNI) || !(defined(SKIPKERNELS_ISA_AVX512) || defined(SKIPKERNELS_ISA_AVX2))
    static constexpr bool kIsSigned = false;
    template <int first, int last>
    [[gnu::always_inline]] void add(const uint8_t* codes, const ActivationBlock* const (&x)[N]) {
        if constexpr (first < last) {
            Ints quads[kHalves];
            load_quads<quad_at(first)>(codes, quads);
            each<N>([&](auto n) SKIPKERNELS_INLINE {
                const Ints activations = broadcast_quad(x[n]->q + 4 * quad_at(first));
                each<kHalves>([&](auto h)
                                  SKIPKERNELS_INLINE { sums[h][n] = add_dot(sums[h][n], quads[h], activations); });
            });
            add<first + 1, last>(codes, x);
        }
    }
#else
    static constexpr bool kIsSigned = bits == 8;  // codes lose their offset before they are multiplied
    // quads whose products a 16-bit sum holds
    static constexpr int kRoom = bits == 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;

    // of the four bytes in each lane, the sums of the first two and of the last two
    [[gnu::always_inline]] static Ints products(Ints quads, Ints activations) {
        if constexpr (kIsSigned) return multiply_bytes(magnitude(quads), with_sign_of(activations, quads));
        return multiply_bytes(quads, activations);
    }

    template <int first, int last>
    [[gnu::always_inline]] void add(const uint8_t* codes, const ActivationBlock* const (&x)[N]) {
        if constexpr (first < last) {
            constexpr int stop = first + kRoom < last ? first + kRoom : last;
            Ints words[kHalves][N];
            add_words_of<first, stop, true>(codes, x, words);
            each<N>([&](auto n) SKIPKERNELS_INLINE {
                each<kHalves>([&](auto h) SKIPKERNELS_INLINE {
                    sums[h][n] = add_ints(sums[h][n], multiply_words(words[h][n], splat_words(1, 1)));
                });
            });
            add<stop, last>(codes, x);
        }
    }

  private:
    template <int at, int stop, bool is_first>
    [[gnu::always_inline]] static void add_words_of(const uint8_t* codes, const ActivationBlock* const (&x)[N],
                                                    Ints (&words)[kHalves][N]) {
        if constexpr (at < stop) {
            Ints quads[kHalves];
            load_quads<quad_at(at)>(codes, quads);
            if constexpr (kIsSigned) each<kHalves>([&](auto h) SKIPKERNELS_INLINE { quads[h] = flip_signs(quads[h]); });
            each<N>([&](auto n) SKIPKERNELS_INLINE {
                const Ints activations = broadcast_quad(x[n]->q + 4 * quad_at(at));
                each<kHalves>([&](auto h) SKIPKERNELS_INLINE {
                    const Ints own = products(quads[h], activations);
                    words[h][n] = is_first ? own : add_words(words[h][n], own);
                });
            });
            add_words_of<at + 1, stop, false>(codes, x, words);
        }
    }
#endif
};

inline Vec load_halves(const uint8_t* p) { return load(reinterpret_cast<const fp16*>(p)); }

// Pieces of a block of columns that have scales of their own.
template <Format format>
constexpr int kScaledParts = cpu::block_traits(format).scales == cpu::Scales::q6_k ? 2 : 1;

// What the codes' offset takes off a sum of products: its product with the sum of the activations.
template <Format format, bool is_signed>
[[gnu::always_inline]] inline Ints first_sum(const ActivationBlock& x, int part) {
    constexpr int kOffset = is_signed ? 0 : cpu::block_traits(format).offset;
    if constexpr (kOffset == 0) return zero_ints();
    return splat_int(-kOffset * (kScaledParts<format> == 2 ? x.sums[part] : x.sums[0] + x.sums[1]));
}

// acc += scale * sums of products of a part of a block, and its minimum, for the lanes from `at` on
template <Format format, int N>
[[gnu::always_inline]] inline void add_scaled(const uint8_t* super, const uint8_t* scales, int part, int at,
                                              const Ints (&sums)[N], const ActivationBlock* const (&x)[N],
                                              Vec (&acc)[N]) {
    constexpr cpu::Scales kScales = cpu::block_traits(format).scales;
    auto multiple = [&](int index) SKIPKERNELS_INLINE { return load_halves(super + 2 * (index * cpu::kLanes + at)); };
    Vec scale;
    if constexpr (kScales == cpu::Scales::q6_k) {
        scale = multiple(0) * load_i8(scales + part * cpu::kLanes + at);
    } else if constexpr (kScales == cpu::Scales::k) {
        scale = multiple(0) * load_u8(scales + at);
    } else {
        scale = load_halves(scales + 2 * at);
    }
    each<N>([&](auto n) SKIPKERNELS_INLINE { acc[n] = fma(to_floats(sums[n]), scale * splat(x[n]->scale), acc[n]); });
    if constexpr (kScales == cpu::Scales::k) {
        const Vec minimum = multiple(1) * load_u8(scales + cpu::kLanes + at);
        each<N>([&](auto n) SKIPKERNELS_INLINE { acc[n] = fma(minimum, splat(-x[n]->scaled_sum), acc[n]); });
    }
    if constexpr (kScales == cpu::Scales::half_and_min) {
        const Vec minimum = load_halves(scales + 2 * (cpu::kLanes + at));
        each<N>([&](auto n) SKIPKERNELS_INLINE { acc[n] = fma(minimum, splat(x[n]->scaled_sum), acc[n]); });
    }
}

// One block of columns: acc[h][n] += weights * x[n].
template <Format format, int N>
[[gnu::always_inline]] inline void add_block(const uint8_t* super, const uint8_t* scales, const uint8_t* codes,
                                             const ActivationBlock* const (&x)[N], Vec (&acc)[kHalves][N]) {
    using BlockDots = Dots<cpu::block_traits(format).code_bits, N>;
    constexpr int kParts = kScaledParts<format>, kQuads = cpu::kQuads / kParts;
    each<kParts>([&](auto part) SKIPKERNELS_INLINE {
        BlockDots dots;
        each<N>([&](auto n) SKIPKERNELS_INLINE {
            const Ints sum = first_sum<format, BlockDots::kIsSigned>(*x[n], part);
            each<kHalves>([&](auto h) SKIPKERNELS_INLINE { dots.sums[h][n] = sum; });
        });
        dots.template add<part * kQuads, (part + 1) * kQuads>(codes, x);
        each<kHalves>([&](auto h) SKIPKERNELS_INLINE {
            add_scaled<format, N>(super, scales, part, h * Ints::lanes, dots.sums[h], x, acc[h]);
        });
    });
}

// Blocks [begin, end) of a group of rows times N rows of activations -> out (N, kLanes), added where they are not the
// first; `fetches` weights ahead, which one of the tiles of rows should do.
template <Format format, int N>
[[gnu::noinline]] void group_times_rows(const uint8_t* group, int64_t columns, int64_t begin, int64_t end,
                                        const ActivationBlock* first_row, bool fetches, float* out) {
    constexpr cpu::BlockTraits kTraits = cpu::block_traits(format);
    const cpu::GroupLayout layout(kTraits, columns);
    const int64_t blocks = activation_blocks(columns);
    Vec acc[kHalves][N];
    for (int h = 0; h < kHalves; ++h)
        for (int n = 0; n < N; ++n) acc[h][n] = begin ? load(out + n * cpu::kLanes + h * Ints::lanes) : splat(0.0f);
    const ActivationBlock* x[N];
    for (int n = 0; n < N; ++n) x[n] = first_row + n * blocks + begin;
    const uint8_t *scales = group + layout.scales + begin * kTraits.scale_bytes(),
                  *codes = group + layout.codes + begin * kTraits.code_bytes();
    constexpr int kLineBytes = 64, kBlockBytes = kTraits.code_bytes() + kTraits.scale_bytes();
    const uint8_t* ahead = group + kAheadBytes;
    for (int64_t block = begin; block < end; ++block) {
        if (fetches) {
            for (int i = 0; i < kBlockBytes; i += kLineBytes) __builtin_prefetch(ahead + i, 0, 2);
            ahead += kBlockBytes;
        }
        const uint8_t* super = group + block / (cpu::kSuperColumns / cpu::kBlockColumns) * kTraits.super_bytes();
        add_block<format, N>(super, scales, codes, x, acc);
        for (int n = 0; n < N; ++n) ++x[n];
        scales += kTraits.scale_bytes();
        codes += kTraits.code_bytes();
    }
    for (int h = 0; h < kHalves; ++h)
        for (int n = 0; n < N; ++n) store(out + n * cpu::kLanes + h * Ints::lanes, acc[h][n]);
}

template <Format format, int... N>
inline void group_of(int n, std::integer_sequence<int, N...>, const uint8_t* group, int64_t columns, int64_t begin,
                     int64_t end, const ActivationBlock* x, bool fetches, float* out) {
    ((n == N + 1 ? group_times_rows<format, N + 1>(group, columns, begin, end, x, fetches, out) : void()), ...);
}

template <class F>
inline void with_block_format(Format format, F f) {
    switch (format) {
        case Format::q8_0:
            return f(std::integral_constant<Format, Format::q8_0>{});
        case Format::q4_0:
            return f(std::integral_constant<Format, Format::q4_0>{});
        case Format::q4_1:
            return f(std::integral_constant<Format, Format::q4_1>{});
        case Format::q5_0:
            return f(std::integral_constant<Format, Format::q5_0>{});
        case Format::q5_1:
            return f(std::integral_constant<Format, Format::q5_1>{});
        case Format::q4_k:
            return f(std::integral_constant<Format, Format::q4_k>{});
        case Format::q5_k:
            return f(std::integral_constant<Format, Format::q5_k>{});
        case Format::q6_k:
            return f(std::integral_constant<Format, Format::q6_k>{});
        default:
            return;
    }
}

// A group times all rows of the list: sink(index in the list, products (kLanes))
template <Format format, class Sink>
inline void group_times_all(const uint8_t* group, int64_t columns, bool fetches, const Scratch& s, Sink sink) {
    const int tiles = (s.num_rows + kMostTogether - 1) / kMostTogether;
    alignas(64) float results[kMostTogether * cpu::kLanes];
    for (int tile = 0; tile < tiles; ++tile) {
        const int row = s.num_rows * tile / tiles, n = s.num_rows * (tile + 1) / tiles - row;
        group_of<format>(n, std::make_integer_sequence<int, kMostTogether>{}, group, columns, 0,
                         activation_blocks(columns), quantised_row(s, columns, row), fetches && tile == 0, results);
        for (int i = 0; i < n; ++i) sink(row + i, results + i * cpu::kLanes);
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
