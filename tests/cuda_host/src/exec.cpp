// Instantiated graphs: nodes run in an order of their dependencies that the seed chooses.
#include <algorithm>

#include "graph.h"

namespace cuda_host {

namespace {

CUgraphExec_st* running = nullptr;

// Copies nodes into `copies`; fails where CUDA would refuse to instantiate.
cudaError_t copy(const CUgraph_st& graph, std::vector<ExecNode>& copies, CUgraphExec_st& exec) {
    if (graph.capture) return cudaErrorIllegalState;
    std::map<const CUgraphNode_st*, size_t> positions;
    for (const auto& node : graph.nodes) {
        if (graph.parent && node->work.type == cudaGraphNodeTypeHost) return cudaErrorNotSupported;
        ExecNode copied;
        copied.work = node->work;
        copied.num_dependencies = node->dependencies.size();
        copied.handle = node->handle;
        copied.condition = node->condition;
        for (const Edge& edge : node->dependencies) {
            copies[positions[edge.from]].dependents.push_back(copies.size());
            copied.overlaps_dependency = edge.data.type == cudaGraphDependencyTypeProgrammatic;
            if (graph.parent && copied.overlaps_dependency && !runtime.settings.programmatic_in_bodies)
                return cudaErrorNotSupported;
        }
        if (node->body) {
            if (const cudaError_t error = copy(*node->body, copied.body, exec)) return error;
        }
        positions[node.get()] = copies.size();
        copies.push_back(std::move(copied));
    }
    for (const auto& [handle, known] : runtime.handles) {
        if (known.graph != &graph) continue;
        if (!known.used) return cudaErrorInvalidValue;
        exec.conditions[handle] = {false, 0, known.assign_default, known.default_value};
    }
    return cudaSuccess;
}

cudaError_t instantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) {
    if (!exec || !runtime.graphs.has(graph) || flags) return cudaErrorInvalidValue;
    CUgraphExec_st* created = runtime.execs.create();
    cudaError_t error = copy(*graph, created->nodes, *created);
    // a graph with conditional nodes is instantiated at most once at a time
    if (!error && !created->conditions.empty() && runtime.execs.has(graph->exec)) error = cudaErrorNotSupported;
    if (error) {
        runtime.execs.destroy(created);
        return error;
    }
    graph->exec = *exec = created;
    return cudaSuccess;
}

cudaError_t run(const std::vector<ExecNode>& nodes);

cudaError_t run_conditional(const ExecNode& node) {
    const Condition& condition = running->conditions.at(node.handle);
    const bool loop = node.condition == cudaGraphCondTypeWhile;
    int64_t iterations = 0;
    do {
        if (!condition.known) return fail_launch("a conditional node's value was never set and has no default");
        record(loop ? "while" : "if", text(condition.value));
        if (condition.value == 0) break;
        if (iterations++ == runtime.settings.while_limit)
            return fail_launch("a WHILE node ran " + std::to_string(iterations - 1) + " times (setting while_limit)");
        if (const cudaError_t error = run(node.body)) return error;
    } while (loop);
    return cudaSuccess;
}

cudaError_t run(const std::vector<ExecNode>& nodes) {
    std::vector<size_t> missing, ready;
    for (size_t i = 0; i < nodes.size(); ++i) {
        missing.push_back(nodes[i].num_dependencies);
        if (missing.back() == 0) ready.push_back(i);
    }
    while (!ready.empty()) {
        auto chosen = std::min_element(ready.begin(), ready.end());
        if (scheduler.order() == Order::descending) chosen = std::max_element(ready.begin(), ready.end());
        if (scheduler.order() == Order::shuffled) chosen = ready.begin() + scheduler.random_below(ready.size());
        std::vector<size_t> group{*chosen};  // a kernel, and those that may begin while it runs
        ready.erase(chosen);
        for (bool grown = true; std::exchange(grown, false);) {
            for (const size_t next : nodes[group.back()].dependents) {
                if (!nodes[next].overlaps_dependency || nodes[next].num_dependencies != 1) continue;
                group.push_back(next);
                grown = true;
                break;
            }
        }
        const ExecNode& node = nodes[group.front()];
        cudaError_t error;
        if (node.work.launch) {
            std::vector<const Launch*> chain;
            for (const size_t member : group) chain.push_back(nodes[member].work.launch.get());
            error = run_launches(chain);
        } else {
            error = node.work.type == cudaGraphNodeTypeConditional ? run_conditional(node) : node.work.execute();
        }
        if (error) return error;
        for (const size_t member : group) {
            for (const size_t dependent : nodes[member].dependents) {
                const bool ran = std::find(group.begin(), group.end(), dependent) != group.end();
                if (--missing[dependent] == 0 && !ran) ready.push_back(dependent);
            }
        }
    }
    return cudaSuccess;
}

}  // namespace

}  // namespace cuda_host

using namespace cuda_host;

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) {
    return call("cudaGraphInstantiate", text(graph, flags), [=] { return instantiate(exec, graph, flags); });
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) {
    return call("cudaGraphInstantiateWithFlags", text(graph, flags), [=] { return instantiate(exec, graph, flags); });
}

cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream) {
    return call("cudaGraphUpload", text(exec, stream), [=] {
        const CUstream_st* known = find_stream(stream);
        if (!runtime.execs.has(exec) || !known) return cudaErrorInvalidResourceHandle;
        return known->capture ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
    });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    return call("cudaGraphLaunch", text(exec, stream), [=] {
        CUstream_st* known = find_stream(stream);
        if (!runtime.execs.has(exec) || !known) return cudaErrorInvalidResourceHandle;
        if (known->capture) return invalidate(*known, cudaErrorStreamCaptureUnsupported);
        if (const cudaError_t error = check_legacy_stream(*known)) return error;
        return submit(*known, [exec] {
            for (auto& [handle, condition] : exec->conditions) {
                if (!condition.assign_default) continue;
                condition.known = true;
                condition.value = condition.default_value;
            }
            running = exec;
            const cudaError_t error = run(exec->nodes);
            running = nullptr;
            return error;
        });
    });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    return call(
        "cudaGraphExecDestroy", text(exec),
        [=] {
            if (!runtime.execs.has(exec)) return cudaErrorInvalidValue;
            const cudaError_t error = drain_all();
            runtime.execs.destroy(exec);
            return error;
        },
        Needs::device_even_if_it_failed);
}

void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) {
    const Thread& thread = scheduler.current();
    const Grid* grid = thread.block->grid;
    const auto found = running ? running->conditions.find(handle) : decltype(running->conditions.find(handle)){};
    if (!running || found == running->conditions.end())
        scheduler.fail("sets a conditional handle that is not one of the graph that runs");
    Condition& condition = found->second;
    if (condition.set_in_run == scheduler.runs() && condition.set_by_grid == grid && condition.set_by_thread != &thread)
        scheduler.fail("sets a conditional handle that another thread of the kernel set too");
    condition.known = true;
    condition.value = value;
    condition.set_in_run = scheduler.runs();
    condition.set_by_grid = grid;
    condition.set_by_thread = &thread;
}
