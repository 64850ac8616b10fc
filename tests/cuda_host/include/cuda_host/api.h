// What hosts call: the part of the CUDA runtime API that csrc/cuda uses, with the signatures of CUDART_VERSION (13.0,
// or 12.x from 12.4 on). Implemented in src/.
#pragma once

#include <cstddef>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "types.h"

#define CUDA_HOST_ERRORS(ERROR)                                                                                   \
    ERROR(cudaSuccess, 0, "no error")                                                                             \
    ERROR(cudaErrorInvalidValue, 1, "invalid argument")                                                           \
    ERROR(cudaErrorMemoryAllocation, 2, "out of memory")                                                          \
    ERROR(cudaErrorInitializationError, 3, "initialization error")                                                \
    ERROR(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                                     \
    ERROR(cudaErrorInsufficientDriver, 35, "CUDA driver version is insufficient for CUDA runtime version")        \
    ERROR(cudaErrorInvalidDeviceFunction, 98, "invalid device function")                                          \
    ERROR(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                                           \
    ERROR(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                                  \
    ERROR(cudaErrorNoKernelImageForDevice, 209, "no kernel image is available for execution on the device")       \
    ERROR(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                                         \
    ERROR(cudaErrorIllegalState, 401, "the operation cannot be performed in the present state")                   \
    ERROR(cudaErrorLossyQuery, 402, "attempted introspection would be semantically lossy")                        \
    ERROR(cudaErrorNotReady, 600, "device not ready")                                                             \
    ERROR(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered")                               \
    ERROR(cudaErrorLaunchOutOfResources, 701, "too many resources requested for launch")                          \
    ERROR(cudaErrorLaunchFailure, 719, "unspecified launch failure")                                              \
    ERROR(cudaErrorCooperativeLaunchTooLarge, 720, "too many blocks in cooperative launch")                       \
    ERROR(cudaErrorNotSupported, 801, "operation not supported")                                                  \
    ERROR(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted row_mask stream is capturing")         \
    ERROR(cudaErrorStreamCaptureInvalidated, 901, "operation failed due to a previous error during capture")      \
    ERROR(cudaErrorStreamCaptureMerge, 902, "operation would result in a merge of separate capture sequences")    \
    ERROR(cudaErrorStreamCaptureUnmatched, 903, "capture was not ended in the same stream as it began")           \
    ERROR(cudaErrorStreamCaptureUnjoined, 904, "capturing stream has unjoined work")                              \
    ERROR(cudaErrorStreamCaptureIsolation, 905, "dependency created on uncaptured work in another stream")        \
    ERROR(cudaErrorStreamCaptureImplicit, 906,                                                                    \
          "operation would make the legacy stream depend on a capturing blocking stream")                         \
    ERROR(cudaErrorCapturedEvent, 907, "operation not permitted on an event last recorded in a capturing stream") \
    ERROR(cudaErrorStreamCaptureWrongThread, 908,                                                                 \
          "attempt to terminate a thread-local capture sequence from another thread")                             \
    ERROR(cudaErrorUnknown, 999, "unknown error")

#define CUDA_HOST_ENUMERATOR(name, value, text) name = value,
enum cudaError { CUDA_HOST_ERRORS(CUDA_HOST_ENUMERATOR) };
#undef CUDA_HOST_ENUMERATOR
typedef cudaError cudaError_t;

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);  // of a failed launch, with what the scheduler found
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

// Device

enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrClockRate = 13,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMemoryClockRate = 36,
    cudaDevAttrGlobalMemoryBusWidth = 37,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrCooperativeLaunch = 95,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrMaxBlocksPerMultiprocessor = 106,
    cudaDevAttrReservedSharedMemoryPerBlock = 111,
};

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem;
    size_t sharedMemPerBlock;
    int warpSize;
    int maxThreadsPerBlock;
    int major, minor;
    int multiProcessorCount;
    int memoryBusWidth;
    int l2CacheSize;
    int maxThreadsPerMultiProcessor;
    size_t sharedMemPerMultiprocessor;
    int cooperativeLaunch;
    size_t sharedMemPerBlockOptin;
    int maxBlocksPerMultiProcessor;
    size_t reservedSharedMemPerBlock;
};

cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);

// Memory: all of it is the host's.

enum cudaMemcpyKind {
    cudaMemcpyHostToHost = 0,
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3,
    cudaMemcpyDefault = 4,
};
constexpr unsigned cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;

typedef struct CUstream_st* cudaStream_t;

cudaError_t cudaMalloc(void** p, size_t bytes);
cudaError_t cudaFree(void* p);
cudaError_t cudaMallocHost(void** p, size_t bytes);
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* p);
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream = 0);
cudaError_t cudaMemset(void* p, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream = 0);

template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
    return cudaMalloc(reinterpret_cast<void**>(p), bytes);
}
template <class T>
cudaError_t cudaMallocHost(T** p, size_t bytes) {
    return cudaMallocHost(reinterpret_cast<void**>(p), bytes);
}
template <class T>
cudaError_t cudaHostAlloc(T** p, size_t bytes, unsigned flags) {
    return cudaHostAlloc(reinterpret_cast<void**>(p), bytes, flags);
}
template <class T>
cudaError_t cudaHostGetDevicePointer(T** device, void* host, unsigned flags) {
    return cudaHostGetDevicePointer(reinterpret_cast<void**>(device), host, flags);
}

// Streams and events

#define cudaStreamLegacy ((cudaStream_t)0x1)
#define cudaStreamPerThread ((cudaStream_t)0x2)
constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;
constexpr unsigned cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2;

typedef struct CUevent_st* cudaEvent_t;
typedef void (*cudaHostFn_t)(void* argument);

cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument);
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = 0);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end);

// Kernels

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

enum cudaLaunchAttributeID {
    cudaLaunchAttributeIgnore = 0,
    cudaLaunchAttributeCooperative = 2,
    cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
union cudaLaunchAttributeValue {
    char pad[64];
    int cooperative;
    int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    char pad[4];
    cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace cuda_host {

struct Launch {
    const void* function;
    std::function<void()> run;  // what each thread does
    dim3 grid, block;
    size_t shared_bytes;
    bool cooperative, programmatic;
};

cudaError_t launch(const cudaLaunchConfig_t* config, const void* function, std::function<void()> run);
cudaError_t set_function_attribute(const void* function, cudaFuncAttribute attribute, int value);
cudaError_t occupancy(int* blocks, const void* function, int block_size, size_t shared_bytes);

}  // namespace cuda_host

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    static_assert((std::is_trivially_copyable_v<Parameters> && ...), "kernel parameters are copied bytewise");
    static_assert((!std::is_reference_v<Parameters> && ...), "kernel parameters are passed by value");
    std::tuple<std::remove_cv_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
    return cuda_host::launch(config, reinterpret_cast<const void*>(kernel),
                             [kernel, values] { std::apply(kernel, values); });
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
    return cuda_host::set_function_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* kernel, int block_size,
                                                          size_t shared_bytes) {
    return cuda_host::occupancy(blocks, reinterpret_cast<const void*>(kernel), block_size, shared_bytes);
}

// Graphs

typedef struct CUgraph_st* cudaGraph_t;
typedef struct CUgraphNode_st* cudaGraphNode_t;
typedef struct CUgraphExec_st* cudaGraphExec_t;
typedef unsigned long long cudaGraphConditionalHandle;

enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal = 0,
    cudaStreamCaptureModeThreadLocal = 1,
    cudaStreamCaptureModeRelaxed = 2,
};
enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone = 0,
    cudaStreamCaptureStatusActive = 1,
    cudaStreamCaptureStatusInvalidated = 2,
};
enum cudaStreamUpdateCaptureDependenciesFlags {
    cudaStreamAddCaptureDependencies = 0,
    cudaStreamSetCaptureDependencies = 1,
};
enum cudaGraphNodeType {
    cudaGraphNodeTypeKernel = 0,
    cudaGraphNodeTypeMemcpy = 1,
    cudaGraphNodeTypeMemset = 2,
    cudaGraphNodeTypeHost = 3,
    cudaGraphNodeTypeEmpty = 5,
    cudaGraphNodeTypeConditional = 13,
};
enum cudaGraphDependencyType {
    cudaGraphDependencyTypeDefault = 0,
    cudaGraphDependencyTypeProgrammatic = 1,
};
#define cudaGraphKernelNodePortDefault 0
#define cudaGraphKernelNodePortProgrammatic 1
struct cudaGraphEdgeData {
    unsigned char from_port, to_port, type, reserved[5];
};
enum cudaGraphConditionalHandleFlags { cudaGraphCondAssignDefault = 1 };
enum cudaGraphConditionalNodeType { cudaGraphCondTypeIf = 0, cudaGraphCondTypeWhile = 1 };
struct cudaConditionalNodeParams {
    cudaGraphConditionalHandle handle;
    cudaGraphConditionalNodeType type;
    unsigned size;
    cudaGraph_t* phGraph_out;
};
struct cudaGraphNodeParams {
    cudaGraphNodeType type;
    int reserved0[3];
    union {
        long long reserved1[29];
        cudaConditionalNodeParams conditional;
    };
    long long reserved2;
};

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned flags);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count);
cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type);
cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t graph,
                                             unsigned default_value = 0, unsigned flags = 0);
void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value);  // for kernels
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags = 0);
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, cudaGraphNode_t*, char*, size_t) {
    return cudaGraphInstantiate(exec, graph, 0);
}
cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t* dependencies,
                                          const cudaGraphEdgeData* edges, size_t count, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);

namespace cuda_host {

// `edges` null: not asked for, or all default.
cudaError_t get_capture_info(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                             cudaGraph_t* graph, const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                             size_t* count);
cudaError_t update_capture_dependencies(cudaStream_t stream, cudaGraphNode_t* dependencies,
                                        const cudaGraphEdgeData* edges, size_t count, unsigned flags);
cudaError_t add_node(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* dependencies,
                     const cudaGraphEdgeData* edges, size_t count, cudaGraphNodeParams* parameters);

}  // namespace cuda_host

// 13.0 dropped the forms without edge data and gave their names to the forms with it.
#if CUDART_VERSION >= 13000
#    define CUDA_HOST_WITH_EDGES(name, version) name
#else
#    define CUDA_HOST_WITH_EDGES(name, version) name##version
inline cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                               unsigned long long* id = nullptr, cudaGraph_t* graph = nullptr,
                                               const cudaGraphNode_t** dependencies = nullptr,
                                               size_t* count = nullptr) {
    return cuda_host::get_capture_info(stream, status, id, graph, dependencies, nullptr, count);
}
#    define cudaStreamGetCaptureInfo cudaStreamGetCaptureInfo_v2
inline cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t stream, cudaGraphNode_t* dependencies, size_t count,
                                                       unsigned flags = 0) {
    return cuda_host::update_capture_dependencies(stream, dependencies, nullptr, count, flags);
}
inline cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* dependencies,
                                    size_t count, cudaGraphNodeParams* parameters) {
    return cuda_host::add_node(node, graph, dependencies, nullptr, count, parameters);
}
#endif

inline cudaError_t CUDA_HOST_WITH_EDGES(cudaStreamGetCaptureInfo,
                                        _v3)(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                             unsigned long long* id = nullptr, cudaGraph_t* graph = nullptr,
                                             const cudaGraphNode_t** dependencies = nullptr,
                                             const cudaGraphEdgeData** edges = nullptr, size_t* count = nullptr) {
    return cuda_host::get_capture_info(stream, status, id, graph, dependencies, edges, count);
}
inline cudaError_t CUDA_HOST_WITH_EDGES(cudaStreamUpdateCaptureDependencies,
                                        _v2)(cudaStream_t stream, cudaGraphNode_t* dependencies,
                                             const cudaGraphEdgeData* edges, size_t count, unsigned flags = 0) {
    return cuda_host::update_capture_dependencies(stream, dependencies, edges, count, flags);
}
inline cudaError_t CUDA_HOST_WITH_EDGES(cudaGraphAddNode, _v2)(cudaGraphNode_t* node, cudaGraph_t graph,
                                                               const cudaGraphNode_t* dependencies,
                                                               const cudaGraphEdgeData* edges, size_t count,
                                                               cudaGraphNodeParams* parameters) {
    return cuda_host::add_node(node, graph, dependencies, edges, count, parameters);
}
#undef CUDA_HOST_WITH_EDGES
