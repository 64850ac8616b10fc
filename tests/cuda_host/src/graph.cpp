// Building graphs by hand.
#include "graph.h"

#include <algorithm>
#include <set>

namespace cuda_host {

namespace {

void destroy_bodies(CUgraph_st& graph) {
    for (const auto& node : graph.nodes) {
        if (!node->body) continue;
        destroy_bodies(*node->body);
        runtime.bodies.destroy(node->body);
    }
}

bool is_inside(const CUgraph_st* graph, const CUgraph_st* outer) {
    return graph && (graph == outer || is_inside(graph->parent, outer));
}

bool is_zero(const cudaGraphNodeParams& parameters) {
    const int* reserved = parameters.reserved0;
    return !reserved[0] && !reserved[1] && !reserved[2] && !parameters.reserved2;
}

cudaError_t add_conditional(CUgraph_st& graph, std::vector<Edge> dependencies, cudaConditionalNodeParams& conditional,
                            cudaGraphNode_t* added) {
    const auto handle = runtime.handles.find(conditional.handle);
    if (handle == runtime.handles.end() || handle->second.used || !is_inside(&graph, handle->second.graph))
        return cudaErrorInvalidValue;
    if (conditional.size != 1) return cudaErrorInvalidValue;
    handle->second.used = true;
    CUgraphNode_st& node = append(graph, {cudaGraphNodeTypeConditional, {}, nullptr}, std::move(dependencies));
    node.handle = conditional.handle;
    node.condition = conditional.type;
    node.body = runtime.bodies.create();
    node.body->parent = &graph;
    conditional.phGraph_out = &node.body;
    *added = &node;
    return cudaSuccess;
}

}  // namespace

bool is_live(cudaGraph_t graph) { return runtime.graphs.has(graph) || runtime.bodies.has(graph); }

// False if a node is not one of the graph's or comes twice, or if a programmatic edge does not start at a kernel.
bool make_edges(const CUgraph_st& graph, const cudaGraphNode_t* nodes, const cudaGraphEdgeData* data, size_t count,
                std::vector<Edge>& edges) {
    if (count && !nodes) return false;
    for (size_t i = 0; i < count; ++i) {
        const auto is_node = [&](const auto& node) { return node.get() == nodes[i]; };
        const auto is_known = [&](const Edge& edge) { return edge.from == nodes[i]; };
        if (std::none_of(graph.nodes.begin(), graph.nodes.end(), is_node)) return false;
        if (std::any_of(edges.begin(), edges.end(), is_known)) return false;
        const Edge edge{nodes[i], data ? data[i] : cudaGraphEdgeData{}};
        const bool programmatic = edge.data.type == cudaGraphDependencyTypeProgrammatic;
        if (edge.data.to_port || programmatic != (edge.data.from_port != 0)) return false;
        if (programmatic && !edge.from->work.launch) return false;
        edges.push_back(edge);
    }
    return true;
}

CUgraphNode_st& append(CUgraph_st& graph, Work work, std::vector<Edge> dependencies) {
    graph.nodes.push_back(std::make_unique<CUgraphNode_st>());
    CUgraphNode_st& node = *graph.nodes.back();
    node.work = std::move(work);
    node.dependencies = std::move(dependencies);
    return node;
}

cudaError_t add_node(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* dependencies,
                     const cudaGraphEdgeData* data, size_t count, cudaGraphNodeParams* parameters) {
    return call("cudaGraphAddNode", text(graph, count), [=] {
        std::vector<Edge> edges;
        if (!node || !parameters || !is_live(graph) || !make_edges(*graph, dependencies, data, count, edges))
            return cudaErrorInvalidValue;
        // only kernels can begin before what they depend on ended
        const auto programmatic = [](const Edge& edge) { return edge.data.type != cudaGraphDependencyTypeDefault; };
        if (std::any_of(edges.begin(), edges.end(), programmatic)) return cudaErrorInvalidValue;
        if (!is_zero(*parameters)) return cudaErrorInvalidValue;
        switch (parameters->type) {
            case cudaGraphNodeTypeConditional:
                return add_conditional(*graph, std::move(edges), parameters->conditional, node);
            case cudaGraphNodeTypeEmpty:
                *node = &append(*graph, {cudaGraphNodeTypeEmpty, [] {}, nullptr}, std::move(edges));
                return cudaSuccess;
            default:
                return cudaErrorNotSupported;
        }
    });
}

}  // namespace cuda_host

using namespace cuda_host;

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned flags) {
    return call("cudaGraphCreate", "", [=] {
        if (!graph || flags) return cudaErrorInvalidValue;
        *graph = runtime.graphs.create();
        return cudaSuccess;
    });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return call(
        "cudaGraphDestroy", text(graph),
        [=] {
            if (!runtime.graphs.has(graph) || graph->capture) return cudaErrorInvalidValue;
            for (auto at = runtime.handles.begin(); at != runtime.handles.end();) {
                at = is_inside(at->second.graph, graph) ? runtime.handles.erase(at) : std::next(at);
            }
            destroy_bodies(*graph);
            runtime.graphs.destroy(graph);
            return cudaSuccess;
        },
        Needs::device_even_if_it_failed);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
    return call("cudaGraphGetNodes", text(graph), [=] {
        if (!is_live(graph) || !count) return cudaErrorInvalidValue;
        for (size_t i = 0; nodes && i < std::min(*count, graph->nodes.size()); ++i) nodes[i] = graph->nodes[i].get();
        *count = graph->nodes.size();
        return cudaSuccess;
    });
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
    return call("cudaGraphNodeGetType", text(node), [=] {
        if (!node || !type) return cudaErrorInvalidValue;
        *type = node->work.type;
        return cudaSuccess;
    });
}

cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t graph,
                                             unsigned default_value, unsigned flags) {
    return call("cudaGraphConditionalHandleCreate", text(graph, default_value, flags), [=] {
        static cudaGraphConditionalHandle last = 0;
        if (!handle || !is_live(graph) || flags > cudaGraphCondAssignDefault) return cudaErrorInvalidValue;
        *handle = ++last;
        runtime.handles[*handle] = {graph, default_value, flags == cudaGraphCondAssignDefault, false};
        return cudaSuccess;
    });
}
