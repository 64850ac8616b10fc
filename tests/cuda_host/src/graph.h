// Graphs, the streams that capture into them, and what instantiation makes of them.
#pragma once

#include <chrono>
#include <deque>
#include <thread>

#include "runtime.h"
#include "scheduler.h"

namespace cuda_host {

struct Edge {
    CUgraphNode_st* from;
    cudaGraphEdgeData data;
};

struct Capture {
    unsigned long long id;
    CUgraph_st* graph;  // null once it ended
    bool owns_graph;    // begun without a graph of the caller's
    CUstream_st* origin;
    std::vector<CUstream_st*> streams;  // that joined, the origin among them
    cudaStreamCaptureMode mode;
    std::thread::id thread;
    bool invalidated = false;
};

// What stays of a graph when it is instantiated.
struct ExecNode {
    Work work;
    std::vector<size_t> dependents;
    size_t num_dependencies = 0;
    bool overlaps_dependency = false;  // may begin while the kernel runs that it depends on
    cudaGraphConditionalHandle handle = 0;
    cudaGraphConditionalNodeType condition = cudaGraphCondTypeIf;
    std::vector<ExecNode> body;
};

struct Condition {
    bool known = false;  // assigned since instantiation
    unsigned value = 0;
    bool assign_default = false;
    unsigned default_value = 0;
    uint64_t set_in_run = 0;  // of the scheduler, by this thread of this grid
    const Grid* set_by_grid = nullptr;
    const Thread* set_by_thread = nullptr;
};

// Work of a stream that nobody has waited for yet; see the setting `asynchronous`.
struct Pending {
    uint64_t number;  // in the order of all streams' work
    std::function<cudaError_t()> run;
};

// stream.cpp
CUstream_st* find_stream(cudaStream_t handle);  // null if there is none
cudaError_t enqueue(cudaStream_t handle, Work work);
// Runs it now, or behind all else in the stream.
cudaError_t submit(CUstream_st& stream, std::function<cudaError_t()> run);
cudaError_t drain(CUstream_st& stream);
cudaError_t drain_all();
void forget_streams();

// capture.cpp
cudaError_t capture_work(CUstream_st& stream, Work work);
cudaError_t invalidate(CUstream_st& stream, cudaError_t error);  // the stream's capture; returns `error`
cudaError_t check_legacy_stream(const CUstream_st& stream);      // whether it would wait for a stream that captures

// graph.cpp
bool is_live(cudaGraph_t graph);
bool make_edges(const CUgraph_st& graph, const cudaGraphNode_t* nodes, const cudaGraphEdgeData* data, size_t count,
                std::vector<Edge>& edges);
CUgraphNode_st& append(CUgraph_st& graph, Work work, std::vector<Edge> dependencies);

}  // namespace cuda_host

struct CUstream_st {
    bool blocking = true;
    int device = 0;
    std::deque<cuda_host::Pending> pending;
    std::shared_ptr<cuda_host::Capture> capture;
    std::vector<cuda_host::Edge> dependencies;    // of the next node captured
    std::vector<cudaGraphNode_t> reported_nodes;  // what cudaStreamGetCaptureInfo gave out
    std::vector<cudaGraphEdgeData> reported_edges;
};

struct CUevent_st {
    unsigned flags = 0;
    bool recorded = false;
    std::chrono::steady_clock::time_point time{};
    int64_t not_ready = 0;                        // queries still to answer "not ready"
    std::shared_ptr<cuda_host::Capture> capture;  // if recorded in one, behind these nodes
    std::vector<cuda_host::Edge> dependencies;
};

struct CUgraphNode_st {
    cuda_host::Work work;
    std::vector<cuda_host::Edge> dependencies;
    cudaGraphConditionalHandle handle = 0;
    cudaGraphConditionalNodeType condition = cudaGraphCondTypeIf;
    cudaGraph_t body = nullptr;
};

struct CUgraph_st {
    CUgraph_st* parent = nullptr;           // of a body
    CUgraphExec_st* exec = nullptr;         // instantiated from it
    cuda_host::Capture* capture = nullptr;  // going on
    std::vector<std::unique_ptr<CUgraphNode_st>> nodes;
};

struct CUgraphExec_st {
    std::vector<cuda_host::ExecNode> nodes;
    std::map<cudaGraphConditionalHandle, cuda_host::Condition> conditions;
};
