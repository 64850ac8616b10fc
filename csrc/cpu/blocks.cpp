#include "blocks.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../checks.h"
#include "numbers.h"
#include "thread_pool.h"

namespace skipkernels::cpu {

namespace {

// A block of GGUF, taken apart. Formats of 32 columns fill the first part.
struct Unpacked {
    uint8_t codes[kSuperColumns];
    uint16_t d, m;                     // fp16 bits; dmin of the K formats
    uint8_t scales[16], minimums[16];  // of the K formats, by 32 columns (q6_k: i8, by 16)
};

uint16_t half_at(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
}

void unpack_nibbles(const uint8_t* from, int columns, uint8_t* codes) {
    for (int i = 0; i < columns / 2; ++i) codes[i] = from[i] & 15, codes[columns / 2 + i] = from[i] >> 4;
}

// The fifth bits of 32 codes: bit i of a word is code i's.
void add_fifth_bits(const uint8_t* from, uint8_t* codes) {
    uint32_t bits;
    std::memcpy(&bits, from, sizeof bits);
    for (int i = 0; i < 32; ++i) codes[i] |= (bits >> i & 1) << 4;
}

// The eight 6-bit scales and minimums of a Q4_K or Q5_K block: 12 bytes.
void unpack_k_scales(const uint8_t* p, Unpacked& to) {
    for (int j = 0; j < 4; ++j) {
        to.scales[j] = p[j] & 63;
        to.minimums[j] = p[j + 4] & 63;
        to.scales[j + 4] = (p[j + 8] & 15) | (p[j] >> 6) << 4;
        to.minimums[j + 4] = p[j + 8] >> 4 | (p[j + 4] >> 6) << 4;
    }
}

void unpack(Format format, const uint8_t* p, Unpacked& to) {
    switch (format) {
        case Format::q8_0:
            to.d = half_at(p);
            for (int i = 0; i < 32; ++i) to.codes[i] = p[2 + i] ^ 0x80;
            break;
        case Format::q4_0:
            to.d = half_at(p);
            unpack_nibbles(p + 2, 32, to.codes);
            break;
        case Format::q4_1:
            to.d = half_at(p), to.m = half_at(p + 2);
            unpack_nibbles(p + 4, 32, to.codes);
            break;
        case Format::q5_0:
            to.d = half_at(p);
            unpack_nibbles(p + 6, 32, to.codes);
            add_fifth_bits(p + 2, to.codes);
            break;
        case Format::q5_1:
            to.d = half_at(p), to.m = half_at(p + 2);
            unpack_nibbles(p + 8, 32, to.codes);
            add_fifth_bits(p + 4, to.codes);
            break;
        case Format::q4_k:
        case Format::q5_k: {
            to.d = half_at(p), to.m = half_at(p + 2);
            unpack_k_scales(p + 4, to);
            const uint8_t* low = p + (format == Format::q4_k ? 16 : 48);
            for (int j = 0; j < 4; ++j) unpack_nibbles(low + 32 * j, 64, to.codes + 64 * j);
            if (format == Format::q5_k) {  // bit j of byte i is that of column 32 j + i
                for (int j = 0; j < 8; ++j)
                    for (int i = 0; i < 32; ++i) to.codes[32 * j + i] |= (p[16 + i] >> j & 1) << 4;
            }
            break;
        }
        case Format::q6_k:
            to.d = half_at(p + 208);
            std::memcpy(to.scales, p + 192, 16);
            for (int half = 0; half < 2; ++half) {
                const uint8_t *low = p + 64 * half, *high = p + 128 + 32 * half;
                uint8_t* codes = to.codes + 128 * half;
                for (int i = 0; i < 32; ++i) {
                    codes[i] = (low[i] & 15) | (high[i] & 3) << 4;
                    codes[i + 32] = (low[i + 32] & 15) | (high[i] >> 2 & 3) << 4;
                    codes[i + 64] = low[i] >> 4 | (high[i] >> 4 & 3) << 4;
                    codes[i + 96] = low[i + 32] >> 4 | (high[i] >> 6) << 4;
                }
            }
            break;
        default:
            break;
    }
}

// 32 codes of a row into its lane of the block's vectors.
void store_codes(int bits, const uint8_t* codes, int lane, uint8_t* vectors) {
    uint8_t bytes[kBlockColumns];
    auto store = [&](int vector, const uint8_t* quad) {
        std::memcpy(vectors + vector * kCodeVector + 4 * lane, quad, 4);
    };
    if (bits == 8) {
        for (int v = 0; v < kQuads; ++v) store(v, codes + 4 * v);
        return;
    }
    for (int i = 0; i < 16; ++i) bytes[i] = (codes[i] & 15) | codes[i + 16] << 4;
    for (int v = 0; v < 4; ++v) store(v, bytes + 4 * v);
    if (bits == 5) {
        uint8_t quad[4] = {};
        for (int j = 0; j < kQuads; ++j)
            for (int i = 0; i < 4; ++i) quad[i] |= (codes[4 * j + i] >> 4) << j;
        store(4, quad);
    }
    if (bits == 6) {
        for (int half = 0; half < 2; ++half) {
            uint8_t quad[4] = {};
            for (int j = 0; j < 4; ++j)
                for (int i = 0; i < 4; ++i) quad[i] |= (codes[16 * half + 4 * j + i] >> 4) << 2 * j;
            store(4 + half, quad);
        }
    }
}

uint8_t load_code(int bits, const uint8_t* vectors, int lane, int column) {
    const int quad = column / 4, at = 4 * lane + column % 4;
    auto byte = [&](int vector) { return vectors[vector * kCodeVector + at]; };
    if (bits == 8) return byte(quad);
    uint8_t code = byte(quad % 4) >> (quad < 4 ? 0 : 4) & 15;
    if (bits == 5) code |= (byte(4) >> quad & 1) << 4;
    if (bits == 6) code |= (byte(4 + quad / 4) >> 2 * (quad % 4) & 3) << 4;
    return code;
}

void store_half(uint8_t* p, int index, uint16_t bits) { std::memcpy(p + 2 * index, &bits, sizeof bits); }

// A source block into a lane of a group; `first` is its first column.
void store_block(const BlockTraits& traits, const GroupLayout& layout, const Unpacked& from, int64_t first, int lane,
                 uint8_t* group) {
    const int64_t super = first / kSuperColumns;
    if (traits.scales == Scales::k) {
        store_half(group + super * traits.super_bytes(), lane, from.d);
        store_half(group + super * traits.super_bytes(), kLanes + lane, from.m);
    }
    if (traits.scales == Scales::q6_k) store_half(group + super * traits.super_bytes(), lane, from.d);
    for (int i = 0; i < traits.source_columns / kBlockColumns; ++i) {
        const int64_t block = first / kBlockColumns + i;
        uint8_t* scales = group + layout.scales + block * traits.scale_bytes();
        switch (traits.scales) {
            case Scales::half_and_min:
                store_half(scales, kLanes + lane, from.m);
                [[fallthrough]];
            case Scales::half:
                store_half(scales, lane, from.d);
                break;
            case Scales::k:
                scales[lane] = from.scales[i], scales[kLanes + lane] = from.minimums[i];
                break;
            case Scales::q6_k:
                scales[lane] = from.scales[2 * i], scales[kLanes + lane] = from.scales[2 * i + 1];
                break;
        }
        store_codes(traits.code_bits, from.codes + kBlockColumns * i, lane,
                    group + layout.codes + block * traits.code_bytes());
    }
}

void interleave_group(Format format, int64_t rows, int64_t columns, const uint8_t* source, uint8_t* group) {
    const BlockTraits traits = block_traits(format);
    const GroupLayout layout(traits, columns);
    const int64_t blocks = columns / traits.source_columns;
    if (rows < kLanes) std::memset(group, 0, layout.bytes);
    Unpacked unpacked{};
    for (int64_t block = 0; block < blocks; ++block) {
        for (int lane = 0; lane < rows; ++lane) {
            unpack(format, source + (lane * blocks + block) * traits.source_bytes, unpacked);
            store_block(traits, layout, unpacked, block * traits.source_columns, lane, group);
        }
    }
}

}  // namespace

size_t interleaved_bytes(Format format, int64_t rows, int64_t columns) {
    return num_groups(rows) * GroupLayout(block_traits(format), columns).bytes;
}

void interleave(Format format, int64_t rows, int64_t columns, const uint8_t* source, uint8_t* out, int num_threads) {
    const BlockTraits traits = block_traits(format);
    check(!is_float(format) && columns % traits.source_columns == 0, "no whole number of blocks in ", columns,
          " columns");
    const int64_t group_bytes = GroupLayout(traits, columns).bytes;
    const int64_t row_bytes = columns / traits.source_columns * traits.source_bytes, groups = num_groups(rows);
    std::atomic<int64_t> next{0};
    auto work = [&](int) {
        for (int64_t group; (group = next.fetch_add(1)) < groups;) {
            const int64_t first = group * kLanes;
            interleave_group(format, std::min<int64_t>(kLanes, rows - first), columns, source + first * row_bytes,
                             out + group * group_bytes);
        }
    };
    if (num_threads == 1) return work(0);
    ThreadPool(num_threads).run(work);
}

void dequantize_row(Format format, int64_t columns, const void* data, int64_t row, float* out) {
    const BlockTraits traits = block_traits(format);
    const GroupLayout layout(traits, columns);
    const auto* group = static_cast<const uint8_t*>(data) + row / kLanes * layout.bytes;
    const int lane = static_cast<int>(row % kLanes);
    auto half = [](const uint8_t* p, int index) { return to_float(fp16{half_at(p + 2 * index)}); };
    for (int64_t column = 0; column < columns; ++column) {
        const int64_t block = column / kBlockColumns, in_block = column % kBlockColumns;
        const uint8_t* super = group + column / kSuperColumns * traits.super_bytes();
        const uint8_t* scales = group + layout.scales + block * traits.scale_bytes();
        const int code = load_code(traits.code_bits, group + layout.codes + block * traits.code_bytes(), lane,
                                   static_cast<int>(in_block)) -
                         traits.offset;
        const float value = static_cast<float>(code);
        switch (traits.scales) {
            case Scales::half:
                out[column] = half(scales, lane) * value;
                break;
            case Scales::half_and_min:
                out[column] = half(scales, lane) * value + half(scales, kLanes + lane);
                break;
            case Scales::k:
                out[column] = half(super, lane) * static_cast<float>(scales[lane]) * value -
                              half(super, kLanes + lane) * static_cast<float>(scales[kLanes + lane]);
                break;
            case Scales::q6_k: {
                const auto scale = static_cast<int8_t>(scales[in_block / 16 * kLanes + lane]);
                out[column] = half(super, lane) * static_cast<float>(scale) * value;
                break;
            }
        }
    }
}

}  // namespace skipkernels::cpu
