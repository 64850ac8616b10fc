// The API itself, for tests that call it from Python, and kernels to put into graphs.
#include "launch.h"

// Address of an API function, null if it is not in the table.
EXPORT void* api(const char* name) {
#define FUNCTION(name) {#name, reinterpret_cast<void*>(name)}
#define OVERLOADED(name, ...)                                                           \
    {                                                                                   \
        #name, reinterpret_cast<void*>(static_cast<cudaError_t (*)(__VA_ARGS__)>(name)) \
    }
    static const struct {
        const char* name;
        void* function;
    } table[] = {
        FUNCTION(cudaDriverGetVersion),
        FUNCTION(cudaRuntimeGetVersion),
        FUNCTION(cudaGetDeviceCount),
        FUNCTION(cudaGetDevice),
        FUNCTION(cudaSetDevice),
        FUNCTION(cudaDeviceSynchronize),
        FUNCTION(cudaDeviceGetAttribute),
        FUNCTION(cudaMemGetInfo),
        FUNCTION(cudaGetLastError),
        FUNCTION(cudaPeekAtLastError),
        OVERLOADED(cudaMalloc, void**, size_t),
        FUNCTION(cudaFree),
        OVERLOADED(cudaMallocHost, void**, size_t),
        FUNCTION(cudaFreeHost),
        OVERLOADED(cudaHostGetDevicePointer, void**, void*, unsigned),
        FUNCTION(cudaMemcpy),
        FUNCTION(cudaMemcpyAsync),
        FUNCTION(cudaMemset),
        FUNCTION(cudaMemsetAsync),
        FUNCTION(cudaStreamCreateWithFlags),
        FUNCTION(cudaStreamDestroy),
        FUNCTION(cudaStreamSynchronize),
        FUNCTION(cudaStreamQuery),
        FUNCTION(cudaStreamWaitEvent),
        FUNCTION(cudaEventCreateWithFlags),
        FUNCTION(cudaEventDestroy),
        FUNCTION(cudaEventRecord),
        FUNCTION(cudaEventQuery),
        FUNCTION(cudaEventSynchronize),
        FUNCTION(cudaEventElapsedTime),
        FUNCTION(cudaStreamBeginCapture),
        FUNCTION(cudaStreamBeginCaptureToGraph),
        FUNCTION(cudaStreamEndCapture),
        FUNCTION(cudaStreamIsCapturing),
        FUNCTION(cudaStreamGetCaptureInfo),
        FUNCTION(cudaStreamUpdateCaptureDependencies),
        FUNCTION(cudaGraphCreate),
        FUNCTION(cudaGraphDestroy),
        FUNCTION(cudaGraphAddNode),
        FUNCTION(cudaGraphGetNodes),
        FUNCTION(cudaGraphConditionalHandleCreate),
        OVERLOADED(cudaGraphInstantiate, cudaGraphExec_t*, cudaGraph_t, unsigned long long),
        FUNCTION(cudaGraphLaunch),
        FUNCTION(cudaGraphExecDestroy),
        FUNCTION(cudaLaunchHostFunc),
    };
    for (const auto& entry : table) {
        if (std::strcmp(entry.name, name) == 0) return entry.function;
    }
    return nullptr;
}

namespace {

__global__ void add(int* x, int value) { *x += value; }

__global__ void multiply(int* x, int value) { *x *= value; }

__global__ void set_condition(cudaGraphConditionalHandle handle, const int* x) { cudaGraphSetConditional(handle, *x); }

// counts down; the loop goes on while x > 0
__global__ void count_down(cudaGraphConditionalHandle handle, int* x) { cudaGraphSetConditional(handle, --*x > 0); }

// A chain of kernels that overlap: each adds 1 to what the one before wrote.
enum Mistake { none, no_wait, reads_before_wait, writes_before_wait, exits_without_trigger };

__global__ void link(int mistake, const int* from, int* to) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (mistake != exits_without_trigger || blockIdx.x > 0) ptx::grid_dependency_launch();  // no mistake: the same
    const int early = mistake == reads_before_wait ? from[i] : 0;
    if (mistake == writes_before_wait) to[i] = -1;
    if (mistake != no_wait) ptx::grid_dependency_wait();
    to[i] = (mistake == reads_before_wait ? early : from[i]) + 1;
}

// to = from + earlier, where `earlier` is read before the wait: right if it was written two kernels before, the one in
// between let this one start after its own wait, and L1 is passed by.
enum Carelessness { careful, triggers_early, reads_from_cache };

__global__ void add_earlier(int carelessness, const int* from, const int* earlier, int* to) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (carelessness == triggers_early) ptx::grid_dependency_launch();
    const int value = carelessness == reads_from_cache ? earlier[i] : ptx::load_relaxed(earlier + i);
    ptx::grid_dependency_wait();
    if (carelessness != triggers_early) ptx::grid_dependency_launch();
    to[i] = from[i] + value;
}

template <class... Parameters, class... Arguments>
int launch_on(cudaStream_t stream, void (*kernel)(Parameters...), dim3 grid, dim3 block, bool programmatic,
              Arguments... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = programmatic;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace

EXPORT int launch_add(cudaStream_t stream, int* x, int value) { return launch_on(stream, add, 1, 1, false, x, value); }

EXPORT int launch_multiply(cudaStream_t stream, int* x, int value) {
    return launch_on(stream, multiply, 1, 1, false, x, value);
}

EXPORT int launch_set_condition(cudaStream_t stream, cudaGraphConditionalHandle handle, const int* x, int threads) {
    return launch_on(stream, set_condition, 1, threads, false, handle, x);
}

EXPORT int launch_count_down(cudaStream_t stream, cudaGraphConditionalHandle handle, int* x) {
    return launch_on(stream, count_down, 1, 1, false, handle, x);
}

EXPORT int launch_link(cudaStream_t stream, int mistake, const int* from, int* to, int blocks, int threads) {
    return launch_on(stream, link, blocks, threads, true, mistake, from, to);
}

EXPORT int launch_add_earlier(cudaStream_t stream, int carelessness, const int* from, const int* earlier, int* to,
                              int blocks, int threads) {
    return launch_on(stream, add_earlier, blocks, threads, true, carelessness, from, earlier, to);
}

EXPORT int launch_with_shared_bytes(int* x, size_t bytes) { return launch(add, 1, 1, bytes, x, 1); }

EXPORT int allow_shared_bytes(int bytes) {
    return cudaFuncSetAttribute(add, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

EXPORT int max_blocks_per_sm(int* blocks, int threads, size_t bytes) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, add, threads, bytes);
}

// Adds a conditional node behind everything the capturing stream holds, makes the stream go on behind it, and returns
// its body: what csrc/cuda does, in the signatures of both versions.
EXPORT int add_conditional(cudaStream_t stream, cudaGraphConditionalHandle handle, int type, cudaGraph_t* body) {
    cudaStreamCaptureStatus status;
    cudaGraph_t graph;
    const cudaGraphNode_t* dependencies;
    size_t count;
    cudaGraphNodeParams parameters{};
    parameters.type = cudaGraphNodeTypeConditional;
    parameters.conditional.handle = handle;
    parameters.conditional.type = static_cast<cudaGraphConditionalNodeType>(type);
    parameters.conditional.size = 1;
    cudaGraphNode_t node;
    cudaError_t error;
#if CUDART_VERSION >= 13000
    error = cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, &dependencies, nullptr, &count);
    if (!error) error = cudaGraphAddNode(&node, graph, dependencies, nullptr, count, &parameters);
    if (!error) {
        error = cudaStreamUpdateCaptureDependencies(stream, &node, nullptr, 1, cudaStreamSetCaptureDependencies);
    }
#else
    error = cudaStreamGetCaptureInfo_v2(stream, &status, nullptr, &graph, &dependencies, &count);
    if (!error) error = cudaGraphAddNode(&node, graph, dependencies, count, &parameters);
    if (!error) error = cudaStreamUpdateCaptureDependencies(stream, &node, 1, cudaStreamSetCaptureDependencies);
#endif
    if (!error) *body = parameters.conditional.phGraph_out[0];
    return error;
}

// The same forms with edge data under one name.
#if CUDART_VERSION >= 13000
#    define WITH_EDGES(name, version) name
#else
#    define WITH_EDGES(name, version) name##version
#endif

// Lets what the stream captures next begin while the kernel before it still runs.
EXPORT int make_dependency_programmatic(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    const cudaGraphNode_t* dependencies;
    const cudaGraphEdgeData* edges;
    size_t count;
    cudaError_t error =
        WITH_EDGES(cudaStreamGetCaptureInfo, _v3)(stream, &status, nullptr, nullptr, &dependencies, &edges, &count);
    if (error || count != 1) return error ? error : cudaErrorUnknown;
    cudaGraphNode_t kernel = dependencies[0];
    cudaGraphEdgeData edge{};
    edge.from_port = cudaGraphKernelNodePortProgrammatic;
    edge.type = cudaGraphDependencyTypeProgrammatic;
    return WITH_EDGES(cudaStreamUpdateCaptureDependencies, _v2)(stream, &kernel, &edge, 1,
                                                                cudaStreamSetCaptureDependencies);
}

// Adds a conditional node with whatever edges the stream's dependencies have.
EXPORT int add_conditional_with_edges(cudaStream_t stream, cudaGraphConditionalHandle handle) {
    cudaStreamCaptureStatus status;
    cudaGraph_t graph;
    const cudaGraphNode_t* dependencies;
    const cudaGraphEdgeData* edges;
    size_t count;
    cudaError_t error =
        WITH_EDGES(cudaStreamGetCaptureInfo, _v3)(stream, &status, nullptr, &graph, &dependencies, &edges, &count);
    if (error) return error;
    cudaGraphNodeParams parameters{};
    parameters.type = cudaGraphNodeTypeConditional;
    parameters.conditional.handle = handle;
    parameters.conditional.size = 1;
    cudaGraphNode_t node;
    return WITH_EDGES(cudaGraphAddNode, _v2)(&node, graph, dependencies, edges, count, &parameters);
}

EXPORT int get_capture_graph(cudaStream_t stream, cudaGraph_t* graph) {
    cudaStreamCaptureStatus status;
    return cudaStreamGetCaptureInfo(stream, &status, nullptr, graph);
}
