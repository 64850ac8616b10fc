// d (m, n) += a (m, k) @ b (n, k)^T with tensor cores, a warp for each 16 x 8 of d; 16-bit a and b, all row-major.
#include "launch.h"

namespace {

__device__ uint32_t load_pair(const uint16_t* p) { return *reinterpret_cast<const uint32_t*>(p); }

template <bool bf16>
__global__ void multiply(const uint16_t* a, const uint16_t* b, float* d, int n, int k) {
    const int group = static_cast<int>(threadIdx.x) / 4, pair = static_cast<int>(threadIdx.x) % 4 * 2;
    const int row = static_cast<int>(blockIdx.y) * 16 + group, column = static_cast<int>(blockIdx.x) * 8;
    float* top = d + row * n + column + pair;
    float* bottom = top + 8 * n;
    float sums[4] = {top[0], top[1], bottom[0], bottom[1]};
    for (int at = pair; at < k; at += 16) {
        const uint16_t *a_top = a + row * k + at, *a_bottom = a_top + 8 * k, *b_column = b + (column + group) * k + at;
        const uint32_t a_fragment[4] = {load_pair(a_top), load_pair(a_bottom), load_pair(a_top + 8),
                                        load_pair(a_bottom + 8)};
        const uint32_t b_fragment[2] = {load_pair(b_column), load_pair(b_column + 8)};
        if constexpr (bf16) {
            ptx::mma_bf16_m16n8k16(sums, a_fragment, b_fragment);
        } else {
            ptx::mma_fp16_m16n8k16(sums, a_fragment, b_fragment);
        }
    }
    top[0] = sums[0], top[1] = sums[1], bottom[0] = sums[2], bottom[1] = sums[3];
}

}  // namespace

EXPORT int launch_multiply(bool bf16, const uint16_t* a, const uint16_t* b, float* d, int m, int n, int k) {
    return launch(bf16 ? multiply<true> : multiply<false>, dim3(n / 8, m / 16), 32, 0, a, b, d, n, k);
}
