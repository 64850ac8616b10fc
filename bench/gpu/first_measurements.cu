// What a GPU's basic operations cost: the figures that decide how a decode step is put together. Prints one JSON
// object.
//
//   nvcc -std=c++17 -O3 -arch=native -Icsrc bench/gpu/first_measurements.cu csrc/cuda/graph.cpp csrc/cuda/condition.cu
//   \
//       -o build/first_measurements && build/first_measurements
//
// Every figure is the median of 20 turns with its 20th and 80th percentile, in microseconds unless it says otherwise.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "cuda/api.h"
#include "cuda/graph.h"
#include "cuda/ptx.cuh"

namespace {

using skipkernels::cuda::check;
using skipkernels::cuda::Graph;
namespace ptx = skipkernels::cuda::ptx;

constexpr int kTurns = 20;
constexpr int kNodes = 200;  // kernels in a chain: long enough that its ends do not matter
bool first_entry = true;

struct Timer {
    cudaEvent_t begin, end;
    Timer() {
        check(cudaEventCreateWithFlags(&begin, cudaEventDefault), "cudaEventCreate");
        check(cudaEventCreateWithFlags(&end, cudaEventDefault), "cudaEventCreate");
    }
    double seconds(cudaStream_t stream, const std::function<void()>& work) {
        check(cudaEventRecord(begin, stream), "cudaEventRecord");
        work();
        check(cudaEventRecord(end, stream), "cudaEventRecord");
        check(cudaEventSynchronize(end), "cudaEventSynchronize");
        float milliseconds = 0;
        check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
        return milliseconds / 1e3;
    }
};

void report(const std::string& name, std::vector<double> values, const char* unit = "us") {
    std::sort(values.begin(), values.end());
    const auto at = [&](double share) { return values[static_cast<size_t>(share * (values.size() - 1))]; };
    std::printf("%s\n  \"%s\": {\"unit\": \"%s\", \"median\": %.4g, \"p20\": %.4g, \"p80\": %.4g}",
                first_entry ? "{" : ",", name.c_str(), unit, at(0.5), at(0.2), at(0.8));
    first_entry = false;
}

// `value(seconds)` of every turn of `work`
void measure(const std::string& name, cudaStream_t stream, const std::function<void()>& work,
             const std::function<double(double)>& value, const char* unit = "us") {
    Timer timer;
    timer.seconds(stream, work);
    std::vector<double> values;
    for (int turn = 0; turn < kTurns; ++turn) values.push_back(value(timer.seconds(stream, work)));
    report(name, values, unit);
}

__global__ void read_all(const uint4* data, int64_t count, uint32_t* sink) {
    uint32_t sum = 0;
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = __ldcs(data + min(i + j * step, count - 1));
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (sum == 0x5eed) *sink = sum;  // never; the reads must not be optimised away
}

__global__ void empty() {
    ptx::grid_dependency_launch();
    ptx::grid_dependency_wait();
}

__global__ void set_flags(int32_t* flags, int32_t value) { flags[0] = value; }

__global__ void grid_barriers(int* counter, int rounds) {
    for (int round = 1; round <= rounds; ++round) {
        __syncthreads();
        if (threadIdx.x == 0) {
            ptx::atomic_add_acq_rel(counter, 1);
            while (ptx::atomic_add_acq_rel(counter, 0) < round * static_cast<int>(gridDim.x)) __nanosleep(20);
        }
        __syncthreads();
    }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, int threads, cudaStream_t stream, bool programmatic,
            Arguments... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.stream = stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = programmatic ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "cudaLaunchKernelEx");
}

void chains(cudaStream_t stream, int sms) {
    for (int blocks : {1, sms, 4096}) {
        for (bool programmatic : {false, true}) {
            Graph graph(0);
            graph.begin();
            for (int node = 0; node < kNodes; ++node) launch(empty, blocks, 128, graph.stream(), programmatic && node);
            graph.finish();
            measure(
                "empty kernel in a chain, " + std::to_string(blocks) + " blocks" + (programmatic ? ", PDL" : ""),
                stream, [&] { graph.launch(stream); }, [](double s) { return s / kNodes * 1e6; });
        }
    }
}

void if_nodes(cudaStream_t stream, int sms, int32_t* flags) {
    for (bool taken : {false, true}) {
        Graph graph(0);
        graph.begin();
        for (int node = 0; node < kNodes / 2; ++node) {
            graph.begin_if(flags, 1);
            launch(empty, sms, 128, graph.stream(), false);
            launch(empty, sms, 128, graph.stream(), true);
            graph.end_body();
        }
        graph.finish();
        launch(set_flags, 1, 1, stream, false, flags, taken ? 1 : 0);
        measure(
            std::string("IF node with its setter, ") + (taken ? "taken, two kernels inside" : "not taken"), stream,
            [&] { graph.launch(stream); }, [](double s) { return s / (kNodes / 2) * 1e6; });
    }
}

// A step of ten kernels: as one launch that loops on the device, and as launches enqueued one behind the other.
void loops(cudaStream_t stream, int sms, int32_t* flags) {
    constexpr int kKernels = 10, kSteps = 200;
    const auto step = [&](Graph& graph) {
        for (int node = 0; node < kKernels; ++node) launch(empty, sms, 128, graph.stream(), node > 0);
    };
    launch(set_flags, 1, 1, stream, false, flags, 1);
    Graph repeated(0), once(0);
    repeated.begin();
    repeated.begin_while(flags, 1);
    step(repeated);
    repeated.end_body();
    repeated.finish();
    once.begin();
    step(once);
    once.finish();
    measure(
        "WHILE iteration of 10 empty kernels", stream,
        [&] {
            repeated.set_steps(kSteps, stream);
            repeated.launch(stream);
        },
        [](double s) { return s / kSteps * 1e6; });
    measure(
        "replay of 10 empty kernels, enqueued ahead", stream,
        [&] {
            for (int i = 0; i < kSteps; ++i) once.launch(stream);
        },
        [](double s) { return s / kSteps * 1e6; });
}

}  // namespace

int main() {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    const int sms = properties.multiProcessorCount;
    cudaStream_t stream{};
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");

    constexpr int64_t kBytes = int64_t{2} << 30;
    const auto buffer = skipkernels::cuda::allocate(kBytes), other = skipkernels::cuda::allocate(kBytes);
    const auto small = skipkernels::cuda::allocate(256);
    check(cudaMemset(small.get(), 0, 256), "cudaMemset");
    auto* flags = static_cast<int32_t*>(small.get());
    const auto gb_per_s = [](double bytes) { return [bytes](double s) { return bytes / s / 1e9; }; };
    for (int blocks_per_sm : {1, 2, 4}) {
        measure(
            "read bandwidth, " + std::to_string(blocks_per_sm) + " blocks of 512 threads per SM", stream,
            [&] {
                launch(read_all, blocks_per_sm * sms, 512, stream, false, static_cast<const uint4*>(buffer.get()),
                       kBytes / 16, reinterpret_cast<uint32_t*>(flags + 8));
            },
            gb_per_s(kBytes), "GB/s");
    }
    measure(
        "copy bandwidth, both ways counted", stream,
        [&] { check(cudaMemcpyAsync(other.get(), buffer.get(), kBytes, cudaMemcpyDeviceToDevice, stream), "copy"); },
        gb_per_s(2.0 * kBytes), "GB/s");
    chains(stream, sms);
    if_nodes(stream, sms, flags);
    loops(stream, sms, flags);
    constexpr int kBarriers = 200;
    measure(
        "grid barrier, one block per SM", stream,
        [&] {
            check(cudaMemsetAsync(flags + 16, 0, sizeof(int), stream), "cudaMemsetAsync");
            launch(grid_barriers, sms, 128, stream, false, flags + 16, kBarriers);
        },
        [](double s) { return s / kBarriers * 1e6; });
    std::printf(",\n  \"device\": \"%s\", \"sms\": %d, \"l2_bytes\": %d\n}\n", properties.name, sms,
                properties.l2CacheSize);
    return 0;
}
