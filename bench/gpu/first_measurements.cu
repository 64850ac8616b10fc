// What a GPU's basic operations cost: the figures that decide how a decode step is put together. Prints a line of JSON
// for each as soon as it is measured. bench/gpu/first.sh compiles and runs it.
//
// Every figure is the median of 20 turns with its 20th and 80th percentile, in microseconds unless it says otherwise.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "cuda/api.h"
#include "cuda/device.h"
#include "cuda/graph.h"
#include "cuda/ptx.cuh"

namespace {

using skipkernels::cuda::check;
using skipkernels::cuda::Graph;
namespace ptx = skipkernels::cuda::ptx;

#if FIRST_DRY_RUN  // on the CPU, to see that it runs
constexpr int kTurns = 2, kNodes = 4, kSteps = 3, kBarriers = 2, kManyBlocks = 6;
constexpr int64_t kBytes = 1 << 16, kBytesOfPair = 1 << 18;
#else
constexpr int kTurns = 20;
constexpr int kNodes = 200;  // kernels in a chain: long enough that its ends do not matter
constexpr int kSteps = 200, kBarriers = 200, kManyBlocks = 4096;
constexpr int64_t kBytes = int64_t{2} << 30, kBytesOfPair = 64 << 20;
#endif

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
    std::printf(
        "{\"part\": \"first\", \"name\": \"%s\", \"unit\": \"%s\", \"median\": %.4g, \"p20\": %.4g, \"p80\": %.4g}\n",
        name.c_str(), unit, at(0.5), at(0.2), at(0.8));
    std::fflush(stdout);  // what comes next may fail
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

// Reads its part of `data` as a matrix kernel reads weights: 64 KB ahead of their use, the first of them before its
// wait. Leaves {multiprocessor, begin, end of the wait, end} of every block.
constexpr int kPairThreads = 256, kCopies = 16;
constexpr size_t kRingBytes = kCopies * kPairThreads * sizeof(uint4);
struct BlockRecord {
    unsigned long long sm, began, waited, ended;
};

__global__ void read_like_linear(const uint4* data, int64_t count, BlockRecord* records, uint32_t* sink) {
    const unsigned long long began = ptx::global_timer();
    auto* ring = reinterpret_cast<uint4*>(ptx::shared_memory()) + threadIdx.x;
    const int64_t step = int64_t{gridDim.x} * kPairThreads;
    int64_t ahead = int64_t{blockIdx.x} * kPairThreads + threadIdx.x;
    const auto copy = [&](int slot) {
        if (ahead < count) ptx::copy_async(ring + slot * kPairThreads, data + ahead);
        ptx::commit_copies();
        ahead += step;
    };
    for (int slot = 0; slot < kCopies; ++slot) copy(slot);
    ptx::grid_dependency_wait();
    const unsigned long long waited = ptx::global_timer();
    ptx::grid_dependency_launch();
    uint32_t sum = 0;
    int slot = 0;
    for (int64_t i = int64_t{blockIdx.x} * kPairThreads + threadIdx.x; i < count; i += step) {
        ptx::wait_copies<kCopies - 1>();
        const uint4 v = ring[slot * kPairThreads];
        sum += v.x ^ v.y ^ v.z ^ v.w;
        copy(slot);
        slot = (slot + 1) % kCopies;
    }
    ptx::wait_copies<0>();
    if (sum == 0x5eed) *sink = sum;  // never
    __syncthreads();
    if (threadIdx.x == 0) records[blockIdx.x] = {ptx::multiprocessor(), began, waited, ptx::global_timer()};
}

template <class... Parameters, class... Arguments>
void launch_with(void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                 bool programmatic, bool cooperative, Arguments... arguments) {
    cudaLaunchConfig_t config{};
    config.dynamicSmemBytes = shared_bytes;
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.stream = stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cooperative ? cudaLaunchAttributeCooperative : cudaLaunchAttributeProgrammaticStreamSerialization;
    if (cooperative) {
        attribute.val.cooperative = 1;
    } else {
        attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    config.attrs = &attribute;
    config.numAttrs = programmatic || cooperative ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "cudaLaunchKernelEx");
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, int threads, cudaStream_t stream, bool programmatic,
            Arguments... arguments) {
    launch_with(kernel, blocks, threads, 0, stream, programmatic, false, arguments...);
}

void chains(cudaStream_t stream, int sms) {
    for (int blocks : {1, sms, kManyBlocks}) {
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
    constexpr int kKernels = 10;
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

// Two kernels of the size and shape of our matrix kernels, one behind the other: whether their blocks share SMs, and
// how long the memory is idle at the boundary.
void pair(cudaStream_t stream, int sms, const uint4* data, uint32_t* sink, int carveout) {
    check(cudaFuncSetAttribute(read_like_linear, cudaFuncAttributePreferredSharedMemoryCarveout, carveout), "carveout");
    check(cudaFuncSetAttribute(read_like_linear, cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes), "shared");
    const size_t bytes = 2 * sms * sizeof(BlockRecord);
    const auto memory = skipkernels::cuda::allocate(bytes);
    auto* records = static_cast<BlockRecord*>(memory.get());
    constexpr int64_t kCount = kBytesOfPair / 2 / 16;
    Graph graph(0);
    graph.begin();
    for (int number = 0; number < 2; ++number) {
        launch_with(read_like_linear, sms, kPairThreads, kRingBytes, graph.stream(), number == 1, false,
                    data + number * kCount, kCount, records + number * sms, sink);
    }
    graph.finish();
    std::vector<double> early, shared, gap, first, second;
    for (int turn = 0; turn < kTurns; ++turn) {
        graph.launch(stream);
        std::vector<BlockRecord> seen(2 * sms);
        check(cudaMemcpyAsync(seen.data(), records, bytes, cudaMemcpyDeviceToHost, stream), "copy");
        check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
        unsigned long long began = ~0ull, ended = 0, waited = ~0ull, last = 0;
        for (int i = 0; i < sms; ++i) {
            began = std::min(began, seen[i].began), ended = std::max(ended, seen[i].ended);
            waited = std::min(waited, seen[sms + i].waited), last = std::max(last, seen[sms + i].ended);
        }
        int num_early = 0, num_shared = 0;
        for (int i = sms; i < 2 * sms; ++i) {
            num_early += seen[i].began < ended;
            for (int j = 0; j < sms; ++j) num_shared += seen[j].sm == seen[i].sm && seen[i].began < seen[j].ended;
        }
        early.push_back(100.0 * num_early / sms), shared.push_back(100.0 * num_shared / sms);
        gap.push_back((static_cast<double>(waited) - static_cast<double>(ended)) / 1e3);
        first.push_back((ended - began) / 1e3), second.push_back((last - waited) / 1e3);
    }
    const std::string of = carveout < 0 ? "pair of 66 KB kernels: " : "pair of 66 KB kernels, one carve-out: ";
    report(of + "blocks of the second that begin before the first ends", early, "%");
    report(of + "blocks of the second beside one of the first on its SM", shared, "%");
    report(of + "the second's wait is over behind the end of the first", gap);
    report(of + "the first, from its begin", first);
    report(of + "the second, from the end of its wait", second);
}

int run() {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    const int sms = properties.multiProcessorCount;
    cudaStream_t stream{};
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");

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
    for (const int carveout : {-1, skipkernels::cuda::carveout_of(0)}) {
        pair(stream, sms, static_cast<const uint4*>(buffer.get()), reinterpret_cast<uint32_t*>(flags + 8), carveout);
    }
    measure(
        "grid barrier, one block per SM", stream,
        [&] {
            check(cudaMemsetAsync(flags + 16, 0, sizeof(int), stream), "cudaMemsetAsync");
            launch_with(grid_barriers, sms, 128, 0, stream, false, true, flags + 16, kBarriers);
        },
        [](double s) { return s / kBarriers * 1e6; });
    std::printf("{\"part\": \"first\", \"device\": \"%s\", \"sms\": %d, \"l2_bytes\": %d}\n", properties.name, sms,
                properties.l2CacheSize);
    return 0;
}

int report_errors() {
    try {
        return run();
    } catch (const std::exception& error) {
        std::printf("{\"part\": \"first\", \"error\": \"%s\"}\n", error.what());
        return 1;
    }
}

}  // namespace

#if FIRST_DRY_RUN
extern "C" __attribute__((visibility("default"))) int first_measurements() { return report_errors(); }
#else
int main() { return report_errors(); }
#endif
