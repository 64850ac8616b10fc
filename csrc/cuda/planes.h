// Blocks of quantised weights as GPU kernels read them, their Layout::rows: see skipkernels/model/planes.py, which lays
// them out.
#pragma once

#include "host_device.h"
#include "program.h"

namespace skipkernels::cuda {

constexpr int kGroupColumns = 128, kBlockColumns = 32, kGroupBlocks = kGroupColumns / kBlockColumns;

enum class PlaneScales { half, half_and_min, k, q6_k, group };  // group: one for it, of codes that are e4m3

struct PlaneTraits {
    int word_codes;  // in 32 bits
    int high_bits;   // of a code, beyond those in its word
    int offset;      // of codes; whole numbers of 8 bits are signed
    PlaneScales scales;

    SKIPKERNELS_HOST_DEVICE constexpr int units() const {
        return word_codes == 8 ? 1 : 2;
    }  // of a lane's words, 16 bytes
    // A lane's of a group: its upper bits, the scales of all four lanes, and the numbers that two groups share.
    SKIPKERNELS_HOST_DEVICE constexpr int high_bytes() const { return 4 * high_bits; }
    SKIPKERNELS_HOST_DEVICE constexpr int scale_bytes() const {
        return scales == PlaneScales::half_and_min ? 16 : scales == PlaneScales::group ? 4 : 8;
    }
    SKIPKERNELS_HOST_DEVICE constexpr int super_bytes() const {
        return scales == PlaneScales::k ? 4 : scales == PlaneScales::q6_k ? 2 : 0;
    }
    SKIPKERNELS_HOST_DEVICE constexpr bool has_min() const {
        return scales == PlaneScales::half_and_min || scales == PlaneScales::k;
    }
};

SKIPKERNELS_HOST_DEVICE constexpr PlaneTraits plane_traits(Format format) {
    switch (format) {
        case Format::q8_0:
            return {4, 0, 0, PlaneScales::half};
        case Format::q4_0:
            return {8, 0, 8, PlaneScales::half};
        case Format::q4_1:
            return {8, 0, 0, PlaneScales::half_and_min};
        case Format::q5_0:
            return {8, 1, 16, PlaneScales::half};
        case Format::q5_1:
            return {8, 1, 0, PlaneScales::half_and_min};
        case Format::q4_k:
            return {8, 0, 0, PlaneScales::k};
        case Format::q5_k:
            return {8, 1, 0, PlaneScales::k};
        case Format::f8_e4m3:
            return {4, 0, 0, PlaneScales::group};
        default:
            return {8, 2, 32, PlaneScales::q6_k};
    }
}

// Where the planes of (rows, columns) weights begin, in bytes, and their size.
struct PlaneOffsets {
    int64_t groups;  // of a row
    int64_t high, scales, supers, bytes;

    PlaneOffsets(Format format, int64_t rows, int64_t columns) : groups((columns + kGroupColumns - 1) / kGroupColumns) {
        const PlaneTraits traits = plane_traits(format);
        const int64_t all = rows * groups;
        const auto padded = [](int64_t size) { return (size + 15) / 16 * 16; };
        high = padded(all * 64 * traits.units());
        scales = high + padded(all * 4 * traits.high_bytes());
        supers = scales + padded(all * traits.scale_bytes());
        bytes = supers + padded(all * traits.super_bytes() / 2);
    }
};

}  // namespace skipkernels::cuda
