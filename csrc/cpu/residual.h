// hidden (height) += branch (height); part = the sums of h h', h^2 and h'^2, for the similarity test
#pragma once

namespace skipkernels::SKIPKERNELS_ISA {

inline void add_and_compare(float* hidden, const float* branch, int height, float* part) {
    float dot = 0, before_squared = 0, after_squared = 0;
    for (int r = 0; r < height; ++r) {
        const float before = hidden[r], after = before + branch[r];
        hidden[r] = after;
        dot += before * after, before_squared += before * before, after_squared += after * after;
    }
    part[0] = dot, part[1] = before_squared, part[2] = after_squared;
}

// The panel from channel `first` on of one row; partials (panels, sequences, 3), null or for decode rows only
inline void add_panel(float* hidden, const float* branch, int64_t first, int height, int row, float* partials,
                      int64_t num_sequences) {
    if (partials && row < num_sequences) {
        const int64_t at = first / cpu::kPanelRows * num_sequences + row;
        add_and_compare(hidden + first, branch, height, partials + 3 * at);
    } else {
        for (int r = 0; r < height; ++r) hidden[first + r] += branch[r];
    }
}

}  // namespace skipkernels::SKIPKERNELS_ISA
