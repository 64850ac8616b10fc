// The conversions and the exchange between lanes, one element a thread.
#include "launch.h"

namespace {

__global__ void widen(bool bf16, const uint16_t* x, float* y, int n) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) y[i] = bf16 ? ptx::bf16_to_float(x[i]) : ptx::fp16_to_float(x[i]);
}

__global__ void narrow(bool bf16, const float* x, uint16_t* y, int n) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) y[i] = bf16 ? ptx::float_to_bf16(x[i]) : ptx::float_to_fp16(x[i]);
}

enum Exchange { shuffle, shuffle_xor, shuffle_down, shuffle_up, ballot, any, all };

// Lanes of one warp that stand in the mask; the others return at once.
__global__ void exchange(int kind, uint32_t mask, int lanes, int width, const int* x, int* y) {
    const uint32_t lane = threadIdx.x;
    if (!(mask >> lane & 1)) return;
    switch (kind) {
        case shuffle:
            y[lane] = __shfl_sync(mask, x[lane], lanes, width);
            break;
        case shuffle_xor:
            y[lane] = __shfl_xor_sync(mask, x[lane], lanes, width);
            break;
        case shuffle_down:
            y[lane] = __shfl_down_sync(mask, x[lane], lanes, width);
            break;
        case shuffle_up:
            y[lane] = __shfl_up_sync(mask, x[lane], lanes, width);
            break;
        case ballot:
            y[lane] = static_cast<int>(__ballot_sync(mask, x[lane]));
            break;
        case any:
            y[lane] = __any_sync(mask, x[lane]);
            break;
        case all:
            y[lane] = __all_sync(mask, x[lane]);
            break;
    }
}

// Which thread ran: (x, y, z) of thread and block, and their sizes.
__global__ void describe_thread(int* out) {
    const uint3 t = threadIdx, b = blockIdx;
    const dim3 n = blockDim, g = gridDim;
    const unsigned block = (b.z * g.y + b.y) * g.x + b.x, thread = (t.z * n.y + t.y) * n.x + t.x;
    int* row = out + 12 * (block * n.x * n.y * n.z + thread);
    const unsigned values[] = {t.x, t.y, t.z, b.x, b.y, b.z, n.x, n.y, n.z, g.x, g.y, g.z};
    for (int i = 0; i < 12; ++i) row[i] = static_cast<int>(values[i]);
}

}  // namespace

EXPORT int launch_widen(bool bf16, const uint16_t* x, float* y, int n) {
    return launch(widen, (n + 255) / 256, 256, 0, bf16, x, y, n);
}

EXPORT int launch_narrow(bool bf16, const float* x, uint16_t* y, int n) {
    return launch(narrow, (n + 255) / 256, 256, 0, bf16, x, y, n);
}

EXPORT int launch_exchange(int kind, uint32_t mask, int lanes, int width, const int* x, int* y) {
    return launch(exchange, 1, 32, 0, kind, mask, lanes, width, x, y);
}

EXPORT int launch_describe_thread(int* out) { return launch(describe_thread, dim3(2, 3, 2), dim3(5, 2, 4), 0, out); }
