#include "graph.h"

#include "condition.h"
#include "device.h"

namespace skipkernels::cuda {

namespace {

// Other threads may allocate while this one captures.
constexpr cudaStreamCaptureMode kCaptureMode = cudaStreamCaptureModeThreadLocal;

cudaStream_t new_stream() {
    cudaStream_t stream{};
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    return stream;
}

}  // namespace

Graph::Graph(int device) : device_(device) {
    const OnDevice on(device_);
    check(set_carveout_of_conditions(carveout_of(device_)), "cudaFuncSetAttribute");
    steps_left_ = allocate(sizeof(int32_t));
}

Graph::~Graph() { release(); }

cudaStream_t Graph::stream() const {
    if (open_.empty()) throw Error("no capture has begun");
    return open_.back().stream;
}

void Graph::begin() {
    if (capturing()) throw Error("a second capture into the same graph before the first has ended");
    release();
    guarded([&] {
        open_.push_back({new_stream(), {}, nullptr, 0});
        check(cudaStreamBeginCapture(stream(), kCaptureMode), "cudaStreamBeginCapture");
    });
}

void Graph::begin_if(const int32_t* row_mask, int64_t batch_size) {
    guarded([&] {
        cudaGraphConditionalHandle handle{};
        check(cudaGraphConditionalHandleCreate(&handle, capture_point(stream()).graph, 0, cudaGraphCondAssignDefault),
              "cudaGraphConditionalHandleCreate");
        check(launch_if_any(handle, row_mask, batch_size, stream()), "if_any");
        open_body(cudaGraphCondTypeIf, handle, {nullptr, handle, nullptr, 0});
    });
}

void Graph::begin_while(const int32_t* active, int64_t batch_size) {
    guarded([&] {
        cudaGraphConditionalHandle handle{};
        check(cudaGraphConditionalHandleCreate(&handle, capture_point(stream()).graph, 1, cudaGraphCondAssignDefault),
              "cudaGraphConditionalHandleCreate");
        open_body(cudaGraphCondTypeWhile, handle, {nullptr, handle, active, batch_size});
    });
}

void Graph::open_body(cudaGraphConditionalNodeType type, cudaGraphConditionalHandle handle, const Body& body) {
    cudaGraphNodeParams params{};
    params.type = cudaGraphNodeTypeConditional;
    params.conditional.handle = handle;
    params.conditional.type = type;
    params.conditional.size = 1;
    const cudaStream_t outer = stream();
    // asked for only now: the node that sets the condition is among the dependencies
    continue_after(outer, add_node(capture_point(outer), params));
    open_.push_back(body);
    open_.back().stream = new_stream();
    check(cudaStreamBeginCaptureToGraph(stream(), params.conditional.phGraph_out[0], nullptr, nullptr, 0, kCaptureMode),
          "cudaStreamBeginCaptureToGraph");
}

void Graph::end_body() {
    if (open_.size() < 2) throw Error("no body is open");
    guarded([&] {
        const Body& body = open_.back();
        if (body.active) {
            auto* steps_left = static_cast<int32_t*>(steps_left_.get());
            check(launch_while_any(body.condition, body.active, body.batch_size, steps_left, body.stream), "while_any");
        }
        cudaGraph_t captured{};  // the node's own graph, which belongs to it
        check(cudaStreamEndCapture(body.stream, &captured), "cudaStreamEndCapture");
        check(cudaStreamDestroy(body.stream), "cudaStreamDestroy");
        open_.pop_back();
    });
}

void Graph::finish() {
    if (open_.size() != 1) throw Error(open_.empty() ? "no capture has begun" : "a body is still open");
    guarded([&] {
        check(cudaStreamEndCapture(stream(), &graph_), "cudaStreamEndCapture");
        check(cudaStreamDestroy(stream()), "cudaStreamDestroy");
        open_.pop_back();
        check<InstantiationError>(cudaGraphInstantiate(&executable_, graph_, 0), "cudaGraphInstantiate");
    });
}

void Graph::abandon() { release(); }

void Graph::set_steps(int32_t steps, cudaStream_t stream) {
    const OnDevice on(device_);
    // from pageable memory: copied before the call returns
    check(cudaMemcpyAsync(steps_left_.get(), &steps, sizeof steps, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
}

void Graph::launch(cudaStream_t stream) {
    if (!executable_) throw Error("nothing has been captured yet");
    const OnDevice on(device_);
    check(cudaGraphLaunch(executable_, stream), "cudaGraphLaunch");
}

template <class Function>
void Graph::guarded(Function function) {
    try {
        const OnDevice on(device_);
        function();
    } catch (...) {
        release();
        throw;
    }
}

// Ends what is being captured, innermost first, and destroys everything; errors of a broken capture do not matter here.
void Graph::release() {
    for (; !open_.empty(); open_.pop_back()) {
        cudaGraph_t captured = nullptr;
        if (open_.back().stream) {
            cudaStreamEndCapture(open_.back().stream, &captured);
            cudaStreamDestroy(open_.back().stream);
        }
        if (open_.size() == 1 && captured) cudaGraphDestroy(captured);
    }
    if (executable_) cudaGraphExecDestroy(executable_);
    if (graph_) cudaGraphDestroy(graph_);
    executable_ = nullptr;
    graph_ = nullptr;
    cudaGetLastError();
}

}  // namespace skipkernels::cuda
