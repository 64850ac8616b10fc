// d (m, n) += a (m, k) @ b (n, k)^T on tensor cores, a warp for each 16 x 8 of d; all row-major.
#include "launch.h"

namespace {

__device__ uint32_t word(const void* p) { return *static_cast<const uint32_t*>(p); }

// One warp's tile: T is uint16_t (bf16) or float (tf32), of which two or one fit a word.
template <class T>
__global__ void multiply(const T* a, const T* b, float* d, int n, int k) {
    constexpr int kPerWord = 4 / sizeof(T), kStep = 8 * kPerWord;
    const int group = static_cast<int>(threadIdx.x) / 4, pair = static_cast<int>(threadIdx.x) % 4;
    const int row = static_cast<int>(blockIdx.y) * 16 + group, column = static_cast<int>(blockIdx.x) * 8;
    float* top = d + row * n + column + 2 * pair;
    float* bottom = top + 8 * n;
    float sums[4] = {top[0], top[1], bottom[0], bottom[1]};
    for (int at = pair * kPerWord; at < k; at += kStep) {
        const T *a_top = a + row * k + at, *a_bottom = a_top + 8 * k, *b_column = b + (column + group) * k + at;
        const uint32_t a_words[4] = {word(a_top), word(a_bottom), word(a_top + kStep / 2), word(a_bottom + kStep / 2)};
        const uint32_t b_words[2] = {word(b_column), word(b_column + kStep / 2)};
        if constexpr (kPerWord == 2) {
            ptx::mma_bf16_m16n8k16(sums, a_words, b_words);
        } else {
            ptx::mma_tf32_m16n8k8(sums, a_words, b_words);
        }
    }
    top[0] = sums[0], top[1] = sums[1], bottom[0] = sums[2], bottom[1] = sums[3];
}

}  // namespace

EXPORT int launch_multiply_bf16(const uint16_t* a, const uint16_t* b, float* d, int m, int n, int k) {
    return launch(multiply<uint16_t>, dim3(n / 8, m / 16), 32, 0, a, b, d, n, k);
}

EXPORT int launch_multiply_tf32(const float* a, const float* b, float* d, int m, int n, int k) {
    return launch(multiply<float>, dim3(n / 8, m / 16), 32, 0, a, b, d, n, k);
}
