// From a program to what is launched: which kernels may read flags early, what is prefetched, which gate stands beside
// which kernel. Knows no device.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace skipkernels::cuda {

// Ways to save time, each to be switched off where its gain is measured.
struct Options {
    bool gate_beside_qkv = true;      // skip_gate is an extra block of the qkv_rope_append behind it
    bool late_prefetch = true;        // attention prefetches behind its wait; before it, qkv's weights pass through the
                                      // cache after those that were fetched
    int64_t max_prefetch_bytes = -1;  // of one attention or sample; -1: as the device suits, 0: none
    bool evict_first = true;          // weights leave L2 before all else
    bool early_trigger = true;        // a matrix kernel without a row lets the next one start before its own wait
    bool one_carveout = true;         // all kernels ask for the same split of L1
    bool touch_settled = true;        // what no kernel in flight writes is brought near before the wait
    bool prefetch_first_layer = true;  // sample's idle blocks prefetch what the next step begins with
};

// The steps of a whole program, without arrivals and scratch. `max_prefetch_bytes` takes the place of the options'.
std::vector<Step> plan_steps(const std::vector<Instruction>& program, const Options& options,
                             int64_t max_prefetch_bytes);

}  // namespace skipkernels::cuda
