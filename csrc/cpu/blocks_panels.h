// Products of quantised matrices, part by part, as the ops take them.
#pragma once

#include "single_rows.h"

namespace skipkernels::SKIPKERNELS_ISA {

// Rows [first, first + count) of a part times all rows of the list: sink(index in the list, row - first, values, how
// many) for pieces of up to kLanes rows.
template <class Sink>
inline void blocks_times_rows(const MatrixPart& part, int64_t columns, int64_t first, int64_t count, const Scratch& s,
                              Sink sink) {
    auto each_group = [&](auto multiply) {
        for (int64_t index = first / cpu::kLanes; index * cpu::kLanes < first + count; ++index) {
            const int64_t top = index * cpu::kLanes, begin = top < first ? first : top;
            const int64_t end = top + cpu::kLanes < first + count ? top + cpu::kLanes : first + count;
            multiply(index, [&](int row, const float* products) {
                sink(row, static_cast<int>(begin - first), products + (begin - top), static_cast<int>(end - begin));
            });
        }
    };
    with_block_format(part.format, [&](auto format) {
        constexpr Format kFormat = decltype(format)::value;
        if (part.layout == Layout::single_rows) {
            const SingleRowsProduct<kFormat> product(columns, s);
            each_group([&](int64_t index, auto own) { product.group(part, index * cpu::kLanes, own); });
        } else {
            const int64_t group_bytes = cpu::GroupLayout(cpu::block_traits(kFormat), columns).bytes;
            const auto* data = static_cast<const uint8_t*>(part.data);
            each_group([&](int64_t index, auto own) {
                group_times_all<kFormat>(data + index * group_bytes, columns, true, s, own);
            });
        }
    });
}

// The same of a stack of parts.
template <class Sink>
inline void blocks_times_rows(const Matrix& w, int64_t columns, int64_t first, int64_t count, const Scratch& s,
                              Sink sink) {
    int64_t top = 0, done = 0;
    for (int i = 0; i < w.num_parts && done < count; top += w.parts[i++].rows) {
        const MatrixPart& part = w.parts[i];
        const int64_t from = first + done - top;
        if (from >= part.rows) continue;
        const int64_t here = from + count - done < part.rows ? count - done : part.rows - from;
        blocks_times_rows(part, columns, from, here, s, [&](int row, int at, const float* values, int n) {
            sink(row, static_cast<int>(done) + at, values, n);
        });
        done += here;
    }
}

// Rows [first, first + count) of w -> out (panels, active rows, kPanelRows)
inline void blocks_to_panels(const Matrix& w, int64_t columns, int64_t first, int64_t count, float* out,
                             const Scratch& s) {
    blocks_times_rows(w, columns, first, count, s, [&](int row, int at, const float* values, int n) {
        for (int done = 0; done < n;) {
            const int column = (at + done) % cpu::kPanelRows, left = cpu::kPanelRows - column;
            const int here = left < n - done ? left : n - done;
            float* panel = out + (at + done) / cpu::kPanelRows * s.num_rows * cpu::kPanelRows;
            std::memcpy(panel + row * cpu::kPanelRows + column, values + done, here * sizeof(float));
            done += here;
        }
    });
}

}  // namespace skipkernels::SKIPKERNELS_ISA
