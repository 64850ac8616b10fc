// Bytes behind memory that a kernel may write, which show whether it wrote too far.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace cuda_host {

constexpr size_t kCanaryBytes = 64;
constexpr char kCanary = 0x5a;

inline void put_canary(char* at) { std::memset(at, kCanary, kCanaryBytes); }

inline bool canary_is_intact(const char* at) {
    return std::all_of(at, at + kCanaryBytes, [](char byte) { return byte == kCanary; });
}

}  // namespace cuda_host
