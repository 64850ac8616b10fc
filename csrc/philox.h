// Philox4x32-10 (Salmon et al., SC 2011), for every native executor. The Python twin is skipkernels/program/philox.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace skipkernels {

constexpr uint32_t kSampleStream = 0, kGateStream = 1;

// A number in (0, 1): lane index % 4 of the block at counter (index / 4, step, stream, 0) under key seed.
SKIPKERNELS_HOST_DEVICE inline double philox_uniform(uint64_t seed, uint32_t index, uint32_t step, uint32_t stream) {
    uint32_t c[4] = {index / 4, step, stream, 0};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{c[0]} * 0xD2511F53u, p1 = uint64_t{c[2]} * 0xCD9E8D57u;
        const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(p1),
                                  static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(p0)};
        for (int i = 0; i < 4; ++i) c[i] = next[i];
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return (static_cast<double>(c[index % 4] >> 8) + 0.5) / (1 << 24);
}

}  // namespace skipkernels
