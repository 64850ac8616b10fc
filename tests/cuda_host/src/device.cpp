// Device, memory, and what depends on their sizes.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "graph.h"

namespace cuda_host {

namespace {

constexpr size_t kAlignment = 256;    // of cudaMalloc
constexpr int kReservedBytes = 1024;  // of shared memory, for each block besides its own
constexpr int kBusWidth = 6144;       // bits

cudaError_t check_device(int device) {
    return device >= 0 && device < runtime.settings.device_count ? cudaSuccess : cudaErrorInvalidDevice;
}

int64_t free_bytes() {
    int64_t used = 0;
    for (const auto& [p, bytes] : runtime.device_memory) used += static_cast<int64_t>(bytes);
    return std::max<int64_t>(0, runtime.settings.free_memory - used);
}

// Fresh and freed memory is full of NaN.
cudaError_t allocate(std::map<void*, size_t>& memory, void** p, size_t bytes) {
    if (!p) return cudaErrorInvalidValue;
    if (const cudaError_t error = check_unsafe_call()) return error;
    *p = nullptr;
    if (bytes == 0) return cudaSuccess;
    if (posix_memalign(p, kAlignment, bytes) != 0) return cudaErrorMemoryAllocation;
    std::memset(*p, 0xff, bytes);
    memory[*p] = bytes;
    return cudaSuccess;
}

cudaError_t release(std::map<void*, size_t>& memory, void* p) {
    if (!p) return cudaSuccess;
    const auto found = memory.find(p);
    if (found == memory.end()) return cudaErrorInvalidValue;
    if (const cudaError_t error = check_unsafe_call()) return error;
    const cudaError_t error = drain_all();  // work under way may use it
    std::memset(p, 0xff, found->second);
    memory.erase(found);
    std::free(p);
    return error;
}

bool get_attribute(cudaDeviceAttr attribute, int& value) {
    const Settings& settings = runtime.settings;
    const auto get = [&](int64_t setting) {
        value = static_cast<int>(setting);
        return true;
    };
    // clang-format off
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: return get(1024);
        case cudaDevAttrMaxSharedMemoryPerBlock: return get(settings.shared_bytes_per_block);
        case cudaDevAttrWarpSize: return get(warpSize);
        case cudaDevAttrClockRate: return get(1980000);  // kHz
        case cudaDevAttrMultiProcessorCount: return get(settings.sm_count);
        case cudaDevAttrMemoryClockRate: return get(3201000);  // kHz
        case cudaDevAttrGlobalMemoryBusWidth: return get(kBusWidth);
        case cudaDevAttrL2CacheSize: return get(settings.l2_bytes);
        case cudaDevAttrMaxThreadsPerMultiProcessor: return get(settings.threads_per_sm);
        case cudaDevAttrComputeCapabilityMajor: return get(settings.compute_major);
        case cudaDevAttrComputeCapabilityMinor: return get(settings.compute_minor);
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return get(settings.shared_bytes_per_sm);
        case cudaDevAttrCooperativeLaunch: return get(1);
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return get(settings.shared_bytes_per_block_optin);
        case cudaDevAttrMaxBlocksPerMultiprocessor: return get(settings.blocks_per_sm);
        case cudaDevAttrReservedSharedMemoryPerBlock: return get(kReservedBytes);
    }
    // clang-format on
    return false;
}

}  // namespace

bool is_pinned(const void* p) {
    const auto after = runtime.host_memory.upper_bound(const_cast<void*>(p));
    if (after == runtime.host_memory.begin()) return false;
    const auto& [begin, bytes] = *std::prev(after);
    return p < static_cast<const char*>(begin) + bytes;
}

int64_t blocks_per_sm(const void* function, int64_t block_size, size_t shared_bytes) {
    const Settings& settings = runtime.settings;
    const auto shared = static_cast<int64_t>(shared_bytes);
    const auto set = runtime.max_shared_bytes.find(function);
    if (shared > (set == runtime.max_shared_bytes.end() ? settings.shared_bytes_per_block : set->second)) return 0;
    return std::min({settings.blocks_per_sm, settings.threads_per_sm / ((block_size + 31) / 32 * 32),
                     settings.shared_bytes_per_sm / (shared + kReservedBytes)});
}

cudaError_t set_function_attribute(const void* function, cudaFuncAttribute attribute, int value) {
    return call("cudaFuncSetAttribute", text(function_name(function), attribute, value), [=] {
        if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
        if (value < 0 || value > runtime.settings.shared_bytes_per_block_optin) return cudaErrorInvalidValue;
        runtime.max_shared_bytes[function] = value;
        return cudaSuccess;
    });
}

cudaError_t occupancy(int* blocks, const void* function, int block_size, size_t shared_bytes) {
    return call("cudaOccupancyMaxActiveBlocksPerMultiprocessor",
                text(function_name(function), block_size, shared_bytes), [=] {
                    if (!blocks || block_size < 1 || block_size > 1024) return cudaErrorInvalidValue;
                    *blocks = static_cast<int>(blocks_per_sm(function, block_size, shared_bytes));
                    return cudaSuccess;
                });
}

}  // namespace cuda_host

using namespace cuda_host;

cudaError_t cudaDriverGetVersion(int* version) {
    return call(
        "cudaDriverGetVersion", "",
        [=] {
            if (!version) return cudaErrorInvalidValue;
            *version = static_cast<int>(runtime.settings.driver_version);
            return cudaSuccess;
        },
        Needs::nothing);
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    return call(
        "cudaRuntimeGetVersion", "",
        [=] {
            if (!version) return cudaErrorInvalidValue;
            *version = kRuntimeVersion;
            return cudaSuccess;
        },
        Needs::nothing);
}

cudaError_t cudaGetDeviceCount(int* count) {
    if (count) *count = 0;
    return call("cudaGetDeviceCount", "", [=] {
        if (!count) return cudaErrorInvalidValue;
        *count = static_cast<int>(runtime.settings.device_count);
        return cudaSuccess;
    });
}

cudaError_t cudaGetDevice(int* device) {
    return call("cudaGetDevice", "", [=] {
        if (!device) return cudaErrorInvalidValue;
        *device = runtime.device;
        return cudaSuccess;
    });
}

cudaError_t cudaSetDevice(int device) {
    return call("cudaSetDevice", text(device), [=] {
        const cudaError_t error = check_device(device);
        if (!error) runtime.device = device;
        return error;
    });
}

cudaError_t cudaDeviceSynchronize() {
    return call("cudaDeviceSynchronize", "", [] {
        const cudaError_t error = check_unsafe_call();
        return error ? error : drain_all();
    });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    return call("cudaDeviceGetAttribute", text(attribute, device), [=] {
        if (!value) return cudaErrorInvalidValue;
        if (const cudaError_t error = check_device(device)) return error;
        return get_attribute(attribute, *value) ? cudaSuccess : cudaErrorInvalidValue;
    });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    return call("cudaGetDeviceProperties", text(device), [=] {
        if (!properties) return cudaErrorInvalidValue;
        if (const cudaError_t error = check_device(device)) return error;
        const Settings& settings = runtime.settings;
        *properties = {};
        std::strcpy(properties->name, "CPU pretending to be a GPU");
        properties->totalGlobalMem = static_cast<size_t>(settings.total_memory);
        properties->sharedMemPerBlock = static_cast<size_t>(settings.shared_bytes_per_block);
        properties->warpSize = warpSize;
        properties->maxThreadsPerBlock = 1024;
        properties->major = static_cast<int>(settings.compute_major);
        properties->minor = static_cast<int>(settings.compute_minor);
        properties->multiProcessorCount = static_cast<int>(settings.sm_count);
        properties->memoryBusWidth = kBusWidth;
        properties->l2CacheSize = static_cast<int>(settings.l2_bytes);
        properties->maxThreadsPerMultiProcessor = static_cast<int>(settings.threads_per_sm);
        properties->sharedMemPerMultiprocessor = static_cast<size_t>(settings.shared_bytes_per_sm);
        properties->cooperativeLaunch = 1;
        properties->sharedMemPerBlockOptin = static_cast<size_t>(settings.shared_bytes_per_block_optin);
        properties->maxBlocksPerMultiProcessor = static_cast<int>(settings.blocks_per_sm);
        properties->reservedSharedMemPerBlock = kReservedBytes;
        return cudaSuccess;
    });
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    return call("cudaMemGetInfo", "", [=] {
        if (!free || !total) return cudaErrorInvalidValue;
        *free = static_cast<size_t>(free_bytes());
        *total = static_cast<size_t>(runtime.settings.total_memory);
        return cudaSuccess;
    });
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
    return call("cudaMalloc", text(bytes), [=] {
        if (static_cast<int64_t>(bytes) > free_bytes()) return cudaErrorMemoryAllocation;
        return allocate(runtime.device_memory, p, bytes);
    });
}

cudaError_t cudaFree(void* p) {
    return call(
        "cudaFree", text(p), [=] { return release(runtime.device_memory, p); }, Needs::device_even_if_it_failed);
}

cudaError_t cudaMallocHost(void** p, size_t bytes) {
    return call("cudaMallocHost", text(bytes), [=] { return allocate(runtime.host_memory, p, bytes); });
}

cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned flags) {
    return call("cudaHostAlloc", text(bytes, flags), [=] { return allocate(runtime.host_memory, p, bytes); });
}

cudaError_t cudaFreeHost(void* p) {
    return call(
        "cudaFreeHost", text(p), [=] { return release(runtime.host_memory, p); }, Needs::device_even_if_it_failed);
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags) {
    return call("cudaHostGetDevicePointer", text(host, flags), [=] {
        auto after = runtime.host_memory.upper_bound(host);
        if (!device || flags || after == runtime.host_memory.begin()) return cudaErrorInvalidValue;
        const auto& [begin, bytes] = *--after;
        if (host >= static_cast<char*>(begin) + bytes) return cudaErrorInvalidValue;
        *device = host;
        return cudaSuccess;
    });
}
