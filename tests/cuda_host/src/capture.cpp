// Stream capture: what is put into a capturing stream becomes a node behind those the stream put in before.
#include <algorithm>
#include <set>

#include "graph.h"

namespace cuda_host {

namespace {

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
unsigned long long last_capture_id = 0;
std::vector<std::weak_ptr<Capture>> captures;

template <class Visit>
void for_each_capture(Visit visit) {
    captures.erase(std::remove_if(captures.begin(), captures.end(), [](const auto& known) { return known.expired(); }),
                   captures.end());
    for (const auto& known : captures) {
        const auto capture = known.lock();
        if (capture->graph) visit(*capture);
    }
}

bool is_default(const cudaGraphEdgeData& data) { return !data.from_port && !data.to_port && !data.type; }

void add_edges(std::vector<Edge>& to, const std::vector<Edge>& edges) {
    for (const Edge& edge : edges) {
        const auto same = [&](const Edge& known) { return known.from == edge.from; };
        if (std::none_of(to.begin(), to.end(), same)) to.push_back(edge);
    }
}

void join(CUstream_st& stream, const std::shared_ptr<Capture>& capture) {
    stream.capture = capture;
    stream.dependencies.clear();
    capture->streams.push_back(&stream);
}

cudaError_t begin(cudaStream_t handle, cudaStreamCaptureMode mode, CUgraph_st* graph, std::vector<Edge> dependencies) {
    CUstream_st* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (stream == find_stream(cudaStreamLegacy)) return cudaErrorStreamCaptureUnsupported;
    if (stream->capture || (graph && graph->capture)) return cudaErrorIllegalState;
    const bool owns_graph = !graph;
    if (owns_graph) graph = runtime.graphs.create();
    const auto capture = std::make_shared<Capture>(
        Capture{++last_capture_id, graph, owns_graph, stream, {}, mode, std::this_thread::get_id()});
    captures.push_back(capture);
    graph->capture = capture.get();
    join(*stream, capture);
    stream->dependencies = std::move(dependencies);
    return cudaSuccess;
}

// Whether a stream that took part holds work that the origin does not wait for.
bool has_unjoined_work(const Capture& capture) {
    std::set<const CUgraphNode_st*> joined;
    std::vector<const CUgraphNode_st*> stack;
    for (const Edge& edge : capture.origin->dependencies) stack.push_back(edge.from);
    while (!stack.empty()) {
        const CUgraphNode_st* node = stack.back();
        stack.pop_back();
        if (!joined.insert(node).second) continue;
        for (const Edge& edge : node->dependencies) stack.push_back(edge.from);
    }
    for (const CUstream_st* stream : capture.streams)
        for (const Edge& edge : stream->dependencies)
            if (!joined.count(edge.from)) return true;
    return false;
}

cudaError_t end(Capture& capture, cudaGraph_t* graph) {
    cudaError_t error = cudaSuccess;
    if (capture.invalidated) {
        error = cudaErrorStreamCaptureInvalidated;
    } else if (has_unjoined_work(capture)) {
        error = cudaErrorStreamCaptureUnjoined;
    }
    *graph = error ? nullptr : capture.graph;
    capture.graph->capture = nullptr;
    if (error && capture.owns_graph) runtime.graphs.destroy(capture.graph);
    capture.graph = nullptr;  // events may still hold the capture
    for (CUstream_st* stream : std::exchange(capture.streams, {})) {
        stream->dependencies.clear();
        stream->capture = nullptr;
    }
    return error;
}

}  // namespace

cudaError_t invalidate(CUstream_st& stream, cudaError_t error) {
    stream.capture->invalidated = true;
    return error;
}

cudaError_t check_unsafe_call() {
    cudaError_t result = cudaSuccess;
    for_each_capture([&](Capture& capture) {
        const bool here = capture.thread == std::this_thread::get_id();
        const bool forbidden =
            thread_mode != cudaStreamCaptureModeRelaxed &&
            ((here && capture.mode != cudaStreamCaptureModeRelaxed) ||
             (thread_mode == cudaStreamCaptureModeGlobal && capture.mode == cudaStreamCaptureModeGlobal));
        if (!forbidden) return;
        capture.invalidated = true;
        result = cudaErrorStreamCaptureUnsupported;
    });
    return result;
}

cudaError_t check_legacy_stream(const CUstream_st& stream) {
    if (&stream != find_stream(cudaStreamLegacy)) return cudaSuccess;
    cudaError_t result = cudaSuccess;
    for_each_capture([&](Capture& capture) {
        if (!capture.origin->blocking) return;
        capture.invalidated = true;
        result = cudaErrorStreamCaptureImplicit;
    });
    return result;
}

cudaError_t capture_work(CUstream_st& stream, Work work) {
    Capture& capture = *stream.capture;
    if (capture.invalidated) return cudaErrorStreamCaptureInvalidated;
    std::vector<Edge> dependencies = stream.dependencies;
    // A kernel that may overlap with the one before it. After anything else it waits for the end, as in a stream.
    if (work.launch && work.launch->programmatic && dependencies.size() == 1 && dependencies[0].from->work.launch &&
        is_default(dependencies[0].data)) {
        dependencies[0].data.from_port = cudaGraphKernelNodePortProgrammatic;
        dependencies[0].data.type = cudaGraphDependencyTypeProgrammatic;
    }
    stream.dependencies = {{&append(*capture.graph, std::move(work), std::move(dependencies)), {}}};
    return cudaSuccess;
}

cudaError_t get_capture_info(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                             cudaGraph_t* graph, const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                             size_t* count) {
    return call("cudaStreamGetCaptureInfo", text(handle), [=] {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (!status || (edges && !dependencies)) return cudaErrorInvalidValue;
        *status = cudaStreamCaptureStatusNone;
        if (!stream->capture) return cudaSuccess;
        *status = stream->capture->invalidated ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
        if (stream->capture->invalidated) return cudaSuccess;
        stream->reported_nodes.clear();
        stream->reported_edges.clear();
        for (const Edge& edge : stream->dependencies) {
            if (dependencies && !edges && !is_default(edge.data)) return cudaErrorLossyQuery;
            stream->reported_nodes.push_back(edge.from);
            stream->reported_edges.push_back(edge.data);
        }
        if (id) *id = stream->capture->id;
        if (graph) *graph = stream->capture->graph;
        if (dependencies) *dependencies = stream->reported_nodes.data();
        if (edges) *edges = stream->reported_edges.data();
        if (count) *count = stream->reported_nodes.size();
        return cudaSuccess;
    });
}

cudaError_t update_capture_dependencies(cudaStream_t handle, cudaGraphNode_t* nodes, const cudaGraphEdgeData* data,
                                        size_t count, unsigned flags) {
    return call("cudaStreamUpdateCaptureDependencies", text(handle, count, flags), [=] {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (!stream->capture) return cudaErrorIllegalState;
        if (stream->capture->invalidated) return cudaErrorStreamCaptureInvalidated;
        std::vector<Edge> edges;
        if (flags > cudaStreamSetCaptureDependencies || !make_edges(*stream->capture->graph, nodes, data, count, edges))
            return cudaErrorInvalidValue;
        if (flags == cudaStreamSetCaptureDependencies) stream->dependencies.clear();
        add_edges(stream->dependencies, edges);
        return cudaSuccess;
    });
}

}  // namespace cuda_host

using namespace cuda_host;

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    return call("cudaThreadExchangeStreamCaptureMode", "", [=] {
        if (!mode) return cudaErrorInvalidValue;
        *mode = std::exchange(thread_mode, *mode);
        return cudaSuccess;
    });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    return call("cudaStreamIsCapturing", text(stream), [=] {
        CUstream_st* known = find_stream(stream);
        if (!known) return cudaErrorInvalidResourceHandle;
        if (!status) return cudaErrorInvalidValue;
        *status = !known->capture               ? cudaStreamCaptureStatusNone
                  : known->capture->invalidated ? cudaStreamCaptureStatusInvalidated
                                                : cudaStreamCaptureStatusActive;
        return cudaSuccess;
    });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    return call("cudaStreamBeginCapture", text(stream, mode), [=] { return begin(stream, mode, nullptr, {}); });
}

cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t* dependencies,
                                          const cudaGraphEdgeData* data, size_t count, cudaStreamCaptureMode mode) {
    return call("cudaStreamBeginCaptureToGraph", text(stream, graph, count, mode), [=] {
        std::vector<Edge> edges;
        if (!is_live(graph) || !make_edges(*graph, dependencies, data, count, edges)) return cudaErrorInvalidValue;
        return begin(stream, mode, graph, std::move(edges));
    });
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    return call("cudaStreamEndCapture", text(handle), [=] {
        CUstream_st* stream = find_stream(handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (!graph) return cudaErrorInvalidValue;
        *graph = nullptr;
        const auto capture = stream->capture;
        if (!capture) return cudaErrorIllegalState;
        if (stream != capture->origin) return invalidate(*stream, cudaErrorStreamCaptureUnmatched);
        if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
            return cudaErrorStreamCaptureWrongThread;
        return end(*capture, graph);
    });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
    return call("cudaStreamWaitEvent", text(handle, event, flags), [=] {
        CUstream_st* stream = find_stream(handle);
        if (!stream || !runtime.events.has(event)) return cudaErrorInvalidResourceHandle;
        if (flags) return cudaErrorInvalidValue;
        if (!event->capture) {
            if (stream->capture) return invalidate(*stream, cudaErrorStreamCaptureIsolation);
            return check_legacy_stream(*stream);  // what was recorded is done already
        }
        if (!event->capture->graph || event->capture->invalidated) return cudaErrorStreamCaptureInvalidated;
        if (stream == find_stream(cudaStreamLegacy)) return cudaErrorStreamCaptureImplicit;
        if (stream->capture && stream->capture != event->capture)
            return invalidate(*stream, cudaErrorStreamCaptureMerge);
        if (!stream->capture) join(*stream, event->capture);
        add_edges(stream->dependencies, event->dependencies);
        return cudaSuccess;
    });
}
