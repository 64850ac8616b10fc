// Inner products of single rows (blocks.h) with one row of activations: vectors go along a row's columns, so that it is
// read as the stream that it is in memory.
//
// A unit is a vector of blocks: their first 16 columns together, then the others. Four rows go side by side, for one
// load of activations, and their sums of a unit become one vector: a block a 128-bit lane, a row an element. What
// follows is a group's arithmetic (blocks_linear.h), in its order and to its bits.
#pragma once

#include "blocks_linear.h"

namespace skipkernels::SKIPKERNELS_ISA {

constexpr int kUnitBlocks = Ints::lanes / 4;
constexpr int kUnitBytes = kUnitBlocks * cpu::kBlockColumns;  // of activations
constexpr int kUnitRows = 4;                                  // whose sums are a vector

inline int64_t num_units(int64_t blocks) { return (blocks + kUnitBlocks - 1) / kUnitBlocks; }

// The first block of a unit: the last one goes back so that it is whole, and is why a row needs kUnitBlocks of them.
inline int64_t unit_begin(int64_t unit, int64_t blocks) {
    const int64_t begin = unit * kUnitBlocks, last = blocks - kUnitBlocks;
    return begin < last ? begin : last;
}

// The activations of every unit: the first halves of its blocks, then the second halves.
inline void arrange_units(const ActivationBlock* x, int64_t blocks, int8_t* out) {
    constexpr int kHalf = cpu::kBlockColumns / 2;
    for (int64_t unit = 0; unit < num_units(blocks); ++unit, out += kUnitBytes) {
        const ActivationBlock* own = x + unit_begin(unit, blocks);
        for (int i = 0; i < kUnitBlocks; ++i) {
            std::memcpy(out + i * kHalf, own[i].q, kHalf);
            std::memcpy(out + (kUnitBlocks + i) * kHalf, own[i].q + kHalf, kHalf);
        }
    }
}

// A unit's codes: of the first 16 columns of its blocks, and of the others.
template <int bits>
[[gnu::always_inline]] inline void load_unit(const uint8_t* p, Ints& first, Ints& second) {
    if constexpr (bits == 8) {
        load_halves_of_blocks(p, first, second);
    } else {
        Ints low, upper[2];
        if constexpr (bits == 4) low = load_unaligned(p);
        if constexpr (bits == 5) load_blocks_of_20(p, low, upper[0]);
        if constexpr (bits == 6) load_blocks_of_24(p, low, upper);
        first = and_bytes(low, 15), second = and_bytes(shift<4>(low), 15);
        if constexpr (bits == 5) {  // bits 0..3 of a byte are those of the first half's quads
            const Ints fifth = shift_each<1>(upper[0]);
            first = or_bytes(first, shift<-4>(and_bytes(fifth, 1)));
            second = or_bytes(second, and_bytes(fifth, 16));
        }
        if constexpr (bits == 6) {
            first = or_bytes(first, shift<-4>(and_bytes(shift_each<2>(upper[0]), 3)));
            second = or_bytes(second, shift<-4>(and_bytes(shift_each<2>(upper[1]), 3)));
        }
    }
}

// The unit's sums of products, four for each block, of all columns or of either half.
template <int bits, int parts>
[[gnu::always_inline]] inline void unit_dots(const uint8_t* codes, const int8_t* x, Ints (&sums)[parts]) {
    Ints first, second;
    load_unit<bits>(codes, first, second);
    const Ints own = load_bytes(reinterpret_cast<const uint8_t*>(x));
    const Ints others = load_bytes(reinterpret_cast<const uint8_t*>(x + kUnitBytes / 2));
#if defined(SKIPKERNELS_ISA_VNNI) || !(defined(SKIPKERNELS_ISA_AVX512) || defined(SKIPKERNELS_ISA_AVX2))
    sums[0] = add_dot(zero_ints(), first, own);
    sums[parts - 1] = add_dot(parts == 1 ? sums[0] : zero_ints(), second, others);
#else
    using BlockDots = Dots<bits, 1>;
    if constexpr (BlockDots::kIsSigned) first = flip_signs(first), second = flip_signs(second);
    const Ints words[2] = {BlockDots::products(first, own), BlockDots::products(second, others)};
    auto to_ints = [](Ints pairs) { return multiply_words(pairs, splat_words(1, 1)); };
    if constexpr (parts == 2) {
        sums[0] = to_ints(words[0]), sums[1] = to_ints(words[1]);
    } else if constexpr (bits == 8) {
        sums[0] = add_ints(to_ints(words[0]), to_ints(words[1]));
    } else {
        sums[0] = to_ints(add_words(words[0], words[1]));
    }
#endif
}

// Four rows' sums of products with activations in units: a vector for each unit and part, `stride` apart. fetch() is
// called for every unit.
template <Format format, class Fetch>
[[gnu::always_inline]] inline void four_rows_dots(const uint8_t* const (&codes)[kUnitRows], int64_t blocks,
                                                  const int8_t* x, Ints* out, int64_t stride, Fetch fetch) {
    constexpr int kBits = cpu::block_traits(format).code_bits, kParts = kScaledParts<format>;
    constexpr int64_t kBlockBytes = 4 * kBits;
    for (int64_t unit = 0; unit < num_units(blocks); ++unit, x += kUnitBytes) {
        fetch();
        const int64_t at = unit_begin(unit, blocks) * kBlockBytes;
        Ints sums[kParts][kUnitRows];
        each<kUnitRows>([&](auto row) SKIPKERNELS_INLINE {
            Ints own[kParts];
            unit_dots<kBits, kParts>(codes[row] + at, x, own);
            each<kParts>([&](auto part) SKIPKERNELS_INLINE { sums[part][row] = own[part]; });
        });
        each<kParts>([&](auto part) SKIPKERNELS_INLINE { out[part * stride] = add_fours(sums[part]); });
        out += kParts * stride;
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
