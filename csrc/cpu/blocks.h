// Quantised weights as the kernels read them: GGUF's blocks, with 16 rows side by side.
//
// A group of 16 rows lies in one piece, column block after column block, so that reading it is one linear stream and
// one load of activations serves 16 rows. Its parts, each from a cache line on:
//   supers  of the K formats, per 256 columns: the rows' fp16 d, and (not q6_k) their fp16 dmin
//   scales  per 32 columns: fp16 d (q8_0, q4_0, q5_0), fp16 d, then fp16 m (q4_1, q5_1), u8 scale, then u8 minimum
//           (q4_k, q5_k), or i8 scale of the first 16 columns, then of the last 16 (q6_k)
//   codes   per 32 columns, vectors of 64 bytes: four columns (a quad) of row 0, of row 1, ...
// Codes are unsigned. Vector v of a 4-bit code holds quad v in its low halves and quad v + 4 in its high halves; the
// fifth bits of all eight quads make one vector more (quad j is bit j), the upper two bits of a 6-bit code make two
// (quad j is bits 2j and 2j + 1 of the first, quad j + 4 of the second). q8_0 is w + 128, a vector a quad.
// Rows behind the last are zeros. The K formats' 6-bit scales are spread to bytes: 2.8 % more than in the file.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../program.h"

namespace skipkernels::cpu {

constexpr int kLanes = 16;         // rows side by side
constexpr int kBlockColumns = 32;  // that share a scale, also of activations
constexpr int kSuperColumns = 256;
constexpr int kQuads = kBlockColumns / 4;
constexpr int kCodeVector = 64;  // bytes: a quad of every lane

enum class Scales { half, half_and_min, k, q6_k };

struct BlockTraits {
    int code_bits;
    Scales scales;
    int offset;                        // a weight is scale * (code - offset)
    int source_columns, source_bytes;  // a block in GGUF

    constexpr int code_bytes() const { return code_bits * 64; }
    constexpr int scale_bytes() const { return scales == Scales::half_and_min ? 64 : 32; }
    constexpr int super_bytes() const { return scales == Scales::k ? 64 : scales == Scales::q6_k ? 32 : 0; }
};

constexpr BlockTraits block_traits(Format format) {
    switch (format) {
        case Format::q8_0:
            return {8, Scales::half, 128, 32, 34};
        case Format::q4_0:
            return {4, Scales::half, 8, 32, 18};
        case Format::q4_1:
            return {4, Scales::half_and_min, 0, 32, 20};
        case Format::q5_0:
            return {5, Scales::half, 16, 32, 22};
        case Format::q5_1:
            return {5, Scales::half_and_min, 0, 32, 24};
        case Format::q4_k:
            return {4, Scales::k, 0, 256, 144};
        case Format::q5_k:
            return {5, Scales::k, 0, 256, 176};
        case Format::q6_k:
            return {6, Scales::q6_k, 32, 256, 210};
        default:
            return {};
    }
}

// Where the parts of a group begin, in bytes.
struct GroupLayout {
    int64_t scales, codes, bytes;

    // inlined everywhere: the linker may keep one copy, compiled for an instruction set that this processor lacks
    [[gnu::always_inline]] constexpr GroupLayout(const BlockTraits& traits, int64_t columns)
        : scales(0), codes(0), bytes(0) {
        const int64_t blocks = columns / kBlockColumns;
        const int64_t supers = (columns + kSuperColumns - 1) / kSuperColumns;
        scales = lines(supers * traits.super_bytes());
        codes = scales + lines(blocks * traits.scale_bytes());
        bytes = codes + blocks * traits.code_bytes();
    }
    [[gnu::always_inline]] static constexpr int64_t lines(int64_t size) { return (size + 63) / 64 * 64; }
};

inline int64_t num_groups(int64_t rows) { return (rows + kLanes - 1) / kLanes; }

// Bytes of rows x columns weights side by side.
size_t interleaved_bytes(Format format, int64_t rows, int64_t columns);
// source: rows in GGUF's own blocks -> out (interleaved_bytes), on num_threads threads
void interleave(Format format, int64_t rows, int64_t columns, const uint8_t* source, uint8_t* out, int num_threads);
// One row of an interleaved matrix in fp32: bit for bit what ggml makes of its blocks.
void dequantize_row(Format format, int64_t columns, const void* data, int64_t row, float* out);

}  // namespace skipkernels::cpu
