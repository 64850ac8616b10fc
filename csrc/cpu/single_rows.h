// Quantised rows that each lie in one piece (blocks.h: single rows), so that some can be left unread: 16 of them, from
// anywhere, times rows of activations.
//
// For one row of activations it goes along each row of weights (row_dots.h). For more of them the rows of weights are
// put side by side, 16 at a time, in a buffer that stays in L2, and multiplied as any group. The bits are the same.
#pragma once

#include "row_dots.h"

namespace skipkernels::SKIPKERNELS_ISA {

// 16 rows; of those that come next, `ahead` is fetched on the way.
struct SingleRows {
    const uint8_t* rows[cpu::kLanes];
    RowsAhead<uint8_t> ahead;
};

// Vectors [first, last) of a group, of `total`, into s.group.
inline void gather(SingleRows& single, int64_t first, int64_t last, int64_t total, const Scratch& s) {
    auto* out = reinterpret_cast<float*>(s.group);  // floats stand for quads of any bytes: they are only moved
    for (; first < last; first += Vec::width) {
        const int count = static_cast<int>(last - first < Vec::width ? last - first : Vec::width);
        const int readable = static_cast<int>(total - first < Vec::width ? total - first : Vec::width);
        for (int lane = 0; lane < cpu::kLanes; lane += Vec::width) {
            Vec square[Vec::width];
            for (int i = 0; i < Vec::width; ++i) {
                square[i] = load_some(reinterpret_cast<const float*>(single.rows[lane + i]) + first, readable);
            }
            transpose_square(square);
            for (int i = 0; i < count; ++i) store(out + (first + i) * cpu::kLanes + lane, square[i]);
        }
        single.ahead.fetch(count);
    }
}

// 16 single rows at a time times all rows of activations of the list.
template <Format format>
class SingleRowsProduct {
  public:
    SingleRowsProduct(int64_t columns, const Scratch& s)
        : columns_(columns),
          blocks_(activation_blocks(columns)),
          layout_(kTraits, columns),
          along_rows_(s.num_rows == 1 && blocks_ >= kUnitBlocks),
          s_(s) {
        if (along_rows_) arrange_units(quantised_row(s, columns, 0), blocks_, units());
    }

    // Listed rows of a part, `count` of them; the list goes on to `end`. sink(index in the list of activations,
    // products (kLanes))
    template <class Sink>
    void listed(const MatrixPart& part, const int32_t* list, int count, const int32_t* end, Sink sink) const {
        const uint8_t* coming[cpu::kLanes];
        const int64_t row_bytes = layout_.bytes / cpu::kLanes;
        const auto* data = static_cast<const uint8_t*>(part.data);
        int known = 0;
        for (const int32_t* at = list + cpu::kLanes; at < end && known < cpu::kLanes; ++at) {
            coming[known++] = data + *at * row_bytes;
        }
        SingleRows single{{}, {coming, known, 0, row_bytes}};
        for (int lane = 0; lane < cpu::kLanes; ++lane) {
            single.rows[lane] = data + list[lane < count ? lane : 0] * row_bytes;
        }
        gather_scales(single);
        alignas(64) float results[kMostTogether * cpu::kLanes];
        if (along_rows_) {
            along_rows(single, results);
        } else if (s_.num_rows <= kMostTogether) {
            side_by_side(single, results);
        } else {
            gather(single, layout_.codes / cpu::kCodeVector, vectors(), vectors(), s_);
            return group_times_all<format>(s_.group, columns_, false, s_, sink);
        }
        for (int i = 0; i < s_.num_rows; ++i) sink(i, results + i * cpu::kLanes);
    }

    // The group that begins with row `first`.
    template <class Sink>
    void group(const MatrixPart& part, int64_t first, Sink sink) const {
        int32_t list[2 * cpu::kLanes];
        const int64_t left = part.rows - first, known = left < 2 * cpu::kLanes ? left : 2 * cpu::kLanes;
        for (int64_t i = 0; i < known; ++i) list[i] = static_cast<int32_t>(first + i);
        const int count = static_cast<int>(known < cpu::kLanes ? known : cpu::kLanes);
        listed(part, list, count, list + known, sink);
    }

  private:
    static constexpr cpu::BlockTraits kTraits = cpu::block_traits(format);

    int64_t vectors() const { return layout_.bytes / cpu::kCodeVector; }
    // Both lie in the group's memory where codes would, see cpu::row_dots_bytes.
    int8_t* units() const { return reinterpret_cast<int8_t*>(s_.group + layout_.codes); }
    Ints* sums() const { return reinterpret_cast<Ints*>(units() + num_units(blocks_) * kUnitBytes); }

    // All vectors of scales, as a group has them.
    void gather_scales(SingleRows& single) const {
        const int64_t scales = layout_.codes / cpu::kCodeVector;
        gather(single, 0, scales, vectors(), s_);
        for (int64_t vector = 0; vector < scales; ++vector) {
            uint8_t* at = s_.group + vector * cpu::kCodeVector;
            if (cpu::pieces_of(kTraits, layout_, vector) == cpu::Pieces::halves) {
                split_halves(at);
            } else {
                split_bytes(at);
            }
        }
    }

    // One row of activations -> out (kLanes)
    [[gnu::noinline]] void along_rows(SingleRows& single, float* out) const {
        constexpr int kParts = kScaledParts<format>, kFours = Ints::lanes / kUnitRows;
        const int64_t row_lines = layout_.bytes / cpu::kLanes / cpu::kCodeVector + 1, count = num_units(blocks_);
        const int lines = static_cast<int>((kUnitRows * row_lines + count - 1) / count);
        for (int half = 0; half < kHalves; ++half) {
            const int first = half * Ints::lanes;
            for (int four = 0; four < kFours; ++four) {
                const uint8_t* codes[kUnitRows];
                for (int row = 0; row < kUnitRows; ++row) {
                    codes[row] = single.rows[first + four * kUnitRows + row] + layout_.codes / cpu::kLanes;
                }
                four_rows_dots<format>(codes, blocks_, units(), sums() + four, kFours,
                                       [&]() SKIPKERNELS_INLINE { single.ahead.fetch(lines); });
            }
            Vec acc[1] = {splat(0.0f)};
            for (int64_t unit = 0; unit < count; ++unit) add_unit(sums() + unit * kParts * kFours, unit, first, acc);
            store(out + first, acc[0]);
        }
    }

    // acc += a unit's blocks of the rows from `first` on
    [[gnu::always_inline]] void add_unit(const Ints* sums, int64_t unit, int first, Vec (&acc)[1]) const {
        constexpr int kParts = kScaledParts<format>, kFours = Ints::lanes / kUnitRows;
        Ints of_blocks[kParts][kUnitBlocks];  // a row a lane
        for (int part = 0; part < kParts; ++part) transpose_lanes(sums + part * kFours, of_blocks[part]);
        const ActivationBlock* x = quantised_row(s_, columns_, 0);
        const int64_t begin = unit_begin(unit, blocks_);
        each<kUnitBlocks>([&](auto i) SKIPKERNELS_INLINE {
            const int64_t block = begin + i;
            if (block < unit * kUnitBlocks) return;  // the last unit, which went back
            const uint8_t* super = s_.group + block / (cpu::kSuperColumns / cpu::kBlockColumns) * kTraits.super_bytes();
            const uint8_t* scales = s_.group + layout_.scales + block * kTraits.scale_bytes();
            const ActivationBlock* const own[1] = {x + block};
            each<kParts>([&](auto part) SKIPKERNELS_INLINE {
                const Ints offset = first_sum<format, Dots<kTraits.code_bits, 1>::kIsSigned>(x[block], part);
                const Ints dots[1] = {add_ints(offset, of_blocks[part][i])};
                add_scaled<format, 1>(super, scales, part, first, dots, own, acc);
            });
        });
    }

    // Up to kMostTogether rows of activations -> out (rows, kLanes). Some blocks at a time, so that what comes next is
    // fetched without a pause.
    void side_by_side(SingleRows& single, float* out) const {
        constexpr int64_t kBlocks = 8;
        const int64_t codes = layout_.codes / cpu::kCodeVector;
        for (int64_t begin = 0; begin < blocks_; begin += kBlocks) {
            const int64_t end = begin + kBlocks < blocks_ ? begin + kBlocks : blocks_;
            gather(single, codes + begin * kTraits.code_bits, codes + end * kTraits.code_bits, vectors(), s_);
            group_of<format>(s_.num_rows, std::make_integer_sequence<int, kMostTogether>{}, s_.group, columns_, begin,
                             end, quantised_row(s_, columns_, 0), false, out);
        }
    }

    const int64_t columns_, blocks_;
    const cpu::GroupLayout layout_;
    const bool along_rows_;
    const Scratch& s_;
};

}  // namespace skipkernels::SKIPKERNELS_ISA
