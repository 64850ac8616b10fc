#include "blocks.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

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

// A source block's d and dmin into a lane of a super block's, where the format has some.
void store_supers(const BlockTraits& traits, const Unpacked& from, int lane, uint8_t* super) {
    if (traits.scales == Scales::k || traits.scales == Scales::q6_k) store_half(super, lane, from.d);
    if (traits.scales == Scales::k) store_half(super, kLanes + lane, from.m);
}

// The scales of the `index`-th 32 columns of a source block into a lane.
void store_scales(const BlockTraits& traits, const Unpacked& from, int index, int lane, uint8_t* scales) {
    switch (traits.scales) {
        case Scales::half_and_min:
            store_half(scales, kLanes + lane, from.m);
            [[fallthrough]];
        case Scales::half:
            store_half(scales, lane, from.d);
            break;
        case Scales::k:
            scales[lane] = from.scales[index], scales[kLanes + lane] = from.minimums[index];
            break;
        case Scales::q6_k:
            scales[lane] = from.scales[2 * index], scales[kLanes + lane] = from.scales[2 * index + 1];
            break;
    }
}

// A source block into a lane of a group; `first` is its first column.
void store_block(const BlockTraits& traits, const GroupLayout& layout, const Unpacked& from, int64_t first, int lane,
                 uint8_t* group) {
    store_supers(traits, from, lane, group + first / kSuperColumns * traits.super_bytes());
    for (int i = 0; i < traits.source_columns / kBlockColumns; ++i) {
        const int64_t block = first / kBlockColumns + i;
        store_scales(traits, from, i, lane, group + layout.scales + block * traits.scale_bytes());
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

// Where byte `index` (0..3) of a lane stands in its vector.
int place_in_vector(Pieces pieces, int lane, int index) {
    if (pieces == Pieces::quads) return 4 * lane + index;
    if (pieces == Pieces::halves) return index / 2 * 2 * kLanes + 2 * lane + index % 2;
    return index * kLanes + lane;
}

// A lane of a group to or from a row in one piece: copy(byte of the group, byte of the row).
template <class Copy>
void each_lane_byte(Format format, int64_t columns, int lane, Copy copy) {
    const BlockTraits traits = block_traits(format);
    const GroupLayout layout(traits, columns);
    for (int64_t vector = 0; vector < layout.bytes / kCodeVector; ++vector) {
        const Pieces pieces = pieces_of(traits, layout, vector);
        for (int index = 0; index < 4; ++index) {
            copy(vector * kCodeVector + place_in_vector(pieces, lane, index), 4 * vector + index);
        }
    }
}

void separate_group(Format format, int64_t rows, int64_t columns, const uint8_t* source, uint8_t* out) {
    const int64_t bytes = GroupLayout(block_traits(format), columns).bytes, row_bytes = bytes / kLanes;
    std::vector<uint8_t> group(bytes);
    interleave_group(format, rows, columns, source, group.data());
    for (int lane = 0; lane < rows; ++lane) {
        each_lane_byte(format, columns, lane,
                       [&](int64_t from, int64_t to) { out[lane * row_bytes + to] = group[from]; });
    }
}

// Of a row's code in a column: the byte of its vectors.
int place_in_chunk(int64_t row) {
    const int at = static_cast<int>(row % kChunkRows);
    return at % kLanes / 4 * kLanes + at / kLanes * 4 + at % 4;
}

void store_column_code(int bits, const ColumnLayout& layout, int64_t row, int code, uint8_t* column) {
    const int64_t chunk = row / kChunkRows;
    const int place = place_in_chunk(row);
    auto vector = [&](int64_t index) -> uint8_t& { return column[index * kCodeVector + place]; };
    if (bits == 8) {
        vector(chunk) = static_cast<uint8_t>(code);
        return;
    }
    vector(chunk / 2) |= (code & 15) << chunk % 2 * 4;
    const int64_t first_upper = layout.upper / kCodeVector;
    if (bits == 5) vector(first_upper + chunk / 8) |= (code >> 4) << chunk % 8;
    if (bits == 6) vector(first_upper + chunk / 4) |= (code >> 4) << chunk % 4 * 2;
}

int load_column_code(int bits, const ColumnLayout& layout, int64_t row, const uint8_t* column) {
    const int64_t chunk = row / kChunkRows;
    const int place = place_in_chunk(row);
    auto vector = [&](int64_t index) { return column[index * kCodeVector + place]; };
    if (bits == 8) return vector(chunk);
    int code = vector(chunk / 2) >> chunk % 2 * 4 & 15;
    const int64_t first_upper = layout.upper / kCodeVector;
    if (bits == 5) code |= (vector(first_upper + chunk / 8) >> chunk % 8 & 1) << 4;
    if (bits == 6) code |= (vector(first_upper + chunk / 4) >> chunk % 4 * 2 & 3) << 4;
    return code;
}

// A block of GGUF of every row into single columns; `first` is its first column.
void separate_columns(Format format, int64_t rows, int64_t columns, int64_t first, const uint8_t* source,
                      uint8_t* out) {
    const BlockTraits traits = block_traits(format);
    const ColumnLayout layout(traits, rows, columns);
    const int64_t row_bytes = columns / traits.source_columns * traits.source_bytes;
    const int64_t first_block = first / kBlockColumns;
    uint8_t* blocks = out + layout.blocks + first_block * layout.block_bytes;
    std::memset(blocks, 0, traits.source_columns / kBlockColumns * layout.block_bytes);
    uint8_t* supers = out + first / kSuperColumns * layout.super_bytes;
    if (first % kSuperColumns == 0) std::memset(supers, 0, layout.super_bytes);
    Unpacked unpacked{};
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t group = row / kLanes;
        const int lane = static_cast<int>(row % kLanes);
        unpack(format, source + row * row_bytes + first / traits.source_columns * traits.source_bytes, unpacked);
        store_supers(traits, unpacked, lane, supers + group * traits.super_bytes());
        for (int i = 0; i < traits.source_columns / kBlockColumns; ++i) {
            uint8_t* block = blocks + i * layout.block_bytes;
            store_scales(traits, unpacked, i, lane, block + group * traits.scale_bytes());
            for (int column = 0; column < kBlockColumns; ++column) {
                store_column_code(traits.code_bits, layout, row, unpacked.codes[kBlockColumns * i + column],
                                  block + layout.scale_bytes + column * layout.column_bytes);
            }
        }
    }
}

// A row of single columns into lane 0 of a group.
void collect_lane(Format format, int64_t rows, int64_t columns, const uint8_t* data, int64_t row, uint8_t* group) {
    const BlockTraits traits = block_traits(format);
    const ColumnLayout from(traits, rows, columns);
    const GroupLayout to(traits, columns);
    const int64_t own = row / kLanes;
    const int lane = static_cast<int>(row % kLanes);
    auto half = [&](const uint8_t* source, uint8_t* target, int index) {
        store_half(target, index * kLanes, half_at(source + 2 * (index * kLanes + lane)));
    };
    for (int64_t super = 0; super * kSuperColumns < columns; ++super) {
        const uint8_t* source = data + super * from.super_bytes + own * traits.super_bytes();
        for (int i = 0; i < traits.super_bytes() / (2 * kLanes); ++i)
            half(source, group + super * traits.super_bytes(), i);
    }
    for (int64_t block = 0; block < columns / kBlockColumns; ++block) {
        const uint8_t* source = data + from.blocks + block * from.block_bytes;
        const uint8_t* scales = source + own * traits.scale_bytes();
        uint8_t* target = group + to.scales + block * traits.scale_bytes();
        if (traits.scales == Scales::half || traits.scales == Scales::half_and_min) {
            for (int i = 0; i < traits.scale_bytes() / (2 * kLanes); ++i) half(scales, target, i);
        } else {
            target[0] = scales[lane], target[kLanes] = scales[kLanes + lane];
        }
        uint8_t codes[kBlockColumns];
        for (int column = 0; column < kBlockColumns; ++column) {
            codes[column] = static_cast<uint8_t>(
                load_column_code(traits.code_bits, from, row, source + from.scale_bytes + column * from.column_bytes));
        }
        store_codes(traits.code_bits, codes, 0, group + to.codes + block * traits.code_bytes());
    }
}

}  // namespace

size_t arranged_bytes(Layout layout, Format format, int64_t rows, int64_t columns) {
    const BlockTraits traits = block_traits(format);
    check(traits.code_bits > 0, "CPU kernels read no ", kFormatNames[static_cast<size_t>(format)]);
    check(columns % traits.source_columns == 0, "no whole number of blocks in ", columns, " columns");
    const int64_t group_bytes = GroupLayout(traits, columns).bytes;
    if (layout == Layout::interleaved) return num_groups(rows) * group_bytes;
    if (layout == Layout::single_rows) return rows * group_bytes / kLanes;
    check(layout == Layout::single_columns, "blocks in rows are not arranged");
    return ColumnLayout(traits, rows, columns).bytes;
}

size_t single_column_bytes(Format format, int64_t rows, int64_t columns) {
    arranged_bytes(Layout::single_columns, format, rows, columns);  // checks
    return ColumnLayout(block_traits(format), rows, columns).column_bytes;
}

void arrange(Layout layout, Format format, int64_t rows, int64_t columns, const uint8_t* source, uint8_t* out,
             int num_threads) {
    arranged_bytes(layout, format, rows, columns);  // checks
    const BlockTraits traits = block_traits(format);
    const int64_t group_bytes = GroupLayout(traits, columns).bytes;
    const int64_t row_bytes = columns / traits.source_columns * traits.source_bytes;
    // columns that share a line of supers belong together
    const int64_t columns_of_task = traits.super_bytes() ? kSuperColumns : traits.source_columns;
    const int64_t tasks = layout == Layout::single_columns ? columns / columns_of_task : num_groups(rows);
    std::atomic<int64_t> next{0};
    auto work = [&](int) {
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
            if (layout == Layout::single_columns) {
                separate_columns(format, rows, columns, task * columns_of_task, source, out);
                continue;
            }
            const int64_t first = task * kLanes, count = std::min<int64_t>(kLanes, rows - first);
            const uint8_t* from = source + first * row_bytes;
            if (layout == Layout::interleaved) {
                interleave_group(format, count, columns, from, out + task * group_bytes);
            } else {
                separate_group(format, count, columns, from, out + first * group_bytes / kLanes);
            }
        }
    };
    if (num_threads == 1) return work(0);
    ThreadPool(num_threads).run(work);
}

ArrangedRows::ArrangedRows(Layout layout, Format format, int64_t rows, int64_t columns, const uint8_t* data)
    : layout_(layout), format_(format), rows_(rows), columns_(columns), data_(data) {
    arranged_bytes(layout, format, rows, columns);  // checks
}

void ArrangedRows::dequantize(int64_t row, float* out) const {
    if (layout_ == Layout::interleaved) return dequantize_row(format_, columns_, data_, row, out);
    const int64_t group_bytes = GroupLayout(block_traits(format_), columns_).bytes;
    std::vector<uint8_t> group(group_bytes);
    if (layout_ == Layout::single_rows) {
        const uint8_t* own = data_ + row * group_bytes / kLanes;
        each_lane_byte(format_, columns_, 0, [&](int64_t to, int64_t from) { group[to] = own[from]; });
    } else {
        collect_lane(format_, rows_, columns_, data_, row, group.data());
    }
    dequantize_row(format_, columns_, group.data(), 0, out);
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
