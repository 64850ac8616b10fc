// Quantised weights as the kernels read them: GGUF's blocks in one of three orders.
//
// Interleaved: a group of 16 rows lies in one piece, column block after column block, so that reading it is one linear
// stream and one load of activations serves 16 rows. Its parts, each from a cache line on:
//   supers  of the K formats, per 256 columns: the rows' fp16 d, and (not q6_k) their fp16 dmin
//   scales  per 32 columns: fp16 d (q8_0, q4_0, q5_0), fp16 d, then fp16 m (q4_1, q5_1), u8 scale, then u8 minimum
//           (q4_k, q5_k), or i8 scale of the first 16 columns, then of the last 16 (q6_k)
//   codes   per 32 columns, vectors of 64 bytes: four columns (a quad) of row 0, of row 1, ...
// Codes are unsigned. Vector v of a 4-bit code holds quad v in its low halves and quad v + 4 in its high halves; the
// fifth bits of all eight quads make one vector more (quad j is bit j), the upper two bits of a 6-bit code make two
// (quad j is bits 2j and 2j + 1 of the first, quad j + 4 of the second). q8_0 is w + 128, a vector a quad.
// Rows behind the last are zeros. The K formats' 6-bit scales are spread to bytes: 2.8 % more than in the file.
//
// Single rows: the same bytes, but each row's in one piece, so that one can be left out. Of every 64 bytes of a group a
// row has four, in the group's order: kernels put 16 listed rows back into a group.
//
// Single columns, of a down_proj whose neurons are its columns: rows come in chunks of 64, four groups. Scales are
// those of the groups, side by side for all of them, since 32 columns share them; codes lie column by column:
//   supers  per 256 columns, of every group
//   blocks  per 32 columns: the scales of every group, then the codes of one column after the other
// A column's codes are vectors of 64 bytes, a byte a row. A 4-bit code's vector holds a chunk in its low halves and the
// next one in its high halves; the fifth bits of eight chunks make a vector more, the upper two bits of four chunks. In
// a vector, row 16 k + 4 l + i of a chunk is byte 16 l + 4 k + i: interleaving the bytes of four columns then leaves 16
// rows of the k-th group side by side, a quad each, whether vectors have 64 bytes or 32.
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

// Beside a group's scales: activations, and sums of products of 16 rows, for single rows that are multiplied one by one
// (row_dots.h), whatever the width of vectors.
inline int64_t row_dots_bytes(int64_t columns) {
    const int64_t blocks = columns / kBlockColumns;
    return (blocks + 4) * kBlockColumns + (blocks + 15) / 16 * 16 * 128;
}

inline int64_t num_groups(int64_t rows) { return (rows + kLanes - 1) / kLanes; }

// How the four bytes of a lane lie in a group's vector of 64 bytes.
enum class Pieces { quads, halves, bytes };

// Of vector `index` of a group: quads of codes; two halves (scales, or d and m), each of all lanes; or four bytes.
[[gnu::always_inline]] inline Pieces pieces_of(const BlockTraits& traits, const GroupLayout& layout, int64_t index) {
    if (index * kCodeVector >= layout.codes) return Pieces::quads;
    const bool bytes = traits.scales == Scales::k || traits.scales == Scales::q6_k;
    return bytes && index * kCodeVector >= layout.scales ? Pieces::bytes : Pieces::halves;
}

constexpr int kChunkRows = 64;  // rows of single columns whose codes are a vector
constexpr int kChunkGroups = kChunkRows / kLanes;

// Where the parts of a matrix in single columns begin, in bytes.
struct ColumnLayout {
    int64_t chunks, groups;  // of rows
    int64_t super_bytes, scale_bytes, column_bytes, block_bytes;
    int64_t blocks, bytes;  // where blocks begin, and all end
    int64_t upper;          // in a column: where the bits above the low four begin

    [[gnu::always_inline]] constexpr ColumnLayout(const BlockTraits& traits, int64_t rows, int64_t columns)
        : chunks((rows + kChunkRows - 1) / kChunkRows),
          groups(chunks * kChunkGroups),
          super_bytes(groups * traits.super_bytes()),
          scale_bytes(groups * traits.scale_bytes()),
          column_bytes(0),
          block_bytes(0),
          blocks((columns + kSuperColumns - 1) / kSuperColumns * super_bytes),
          bytes(0),
          upper(kCodeVector * (traits.code_bits == 8 ? chunks : (chunks + 1) / 2)) {
        const int64_t upper_chunks = traits.code_bits == 5 ? 8 : 4;  // in a vector
        const bool has_upper = traits.code_bits == 5 || traits.code_bits == 6;
        column_bytes = upper + (has_upper ? kCodeVector * ((chunks + upper_chunks - 1) / upper_chunks) : 0);
        block_bytes = scale_bytes + kBlockColumns * column_bytes;
        bytes = blocks + columns / kBlockColumns * block_bytes;
    }
};

// Bytes of rows x columns weights in a layout.
size_t arranged_bytes(Layout layout, Format format, int64_t rows, int64_t columns);
// Of a column in layout single_columns: what is not read where it is left out.
size_t single_column_bytes(Format format, int64_t rows, int64_t columns);
// source: rows in GGUF's own blocks -> out (arranged_bytes), on num_threads threads
void arrange(Layout layout, Format format, int64_t rows, int64_t columns, const uint8_t* source, uint8_t* out,
             int num_threads);

// Rows of an arranged matrix in fp32: bit for bit what ggml makes of its blocks.
class ArrangedRows {
  public:
    ArrangedRows(Layout layout, Format format, int64_t rows, int64_t columns, const uint8_t* data);
    void dequantize(int64_t row, float* out) const;

  private:
    Layout layout_;
    Format format_;
    int64_t rows_, columns_;
    const uint8_t* data_;
};
// The same of an interleaved matrix, for kernels.
void dequantize_row(Format format, int64_t columns, const void* data, int64_t row, float* out);

}  // namespace skipkernels::cpu
