// What brings rows of weights near that will be read next.
#pragma once

#include <cstdint>

namespace skipkernels::SKIPKERNELS_ISA {

// Fetches pieces of rows into L2 in the order of their addresses, whatever order they are used in:
// the memory then sees one stream, where four rows side by side ran at two thirds of the bandwidth.
template <class T>
class RowsAhead {
  public:
    RowsAhead(const T* const* rows, int count, int64_t begin, int64_t end)
        : rows_(rows), last_(rows + count), begin_(begin), end_(end) {
        next_row();
    }
    void fetch(int lines) {
        for (; lines > 0 && rows_ < last_; --lines) {
            __builtin_prefetch(at_, 0, 2);
            at_ += 64;
            if (at_ >= row_end_) {
                ++rows_;
                next_row();
            }
        }
    }

  private:
    void next_row() {
        if (rows_ == last_) return;
        at_ = reinterpret_cast<const char*>(*rows_ + begin_);
        row_end_ = reinterpret_cast<const char*>(*rows_ + end_);
    }
    const T *const *rows_, *const *last_;
    int64_t begin_, end_;
    const char *at_ = nullptr, *row_end_ = nullptr;
};

}  // namespace skipkernels::SKIPKERNELS_ISA
