// A CUDA graph: captured once from launches on its own streams, with IF and WHILE bodies, and launched on any stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "api.h"

namespace skipkernels::cuda {

class Graph {
  public:
    explicit Graph(int device);
    ~Graph();
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    // Starts the capture. What is launched on stream() until finish() becomes part of the graph. A call that fails
    // gives the capture up: the graph is then empty, its streams are gone, and begin() may be called again.
    void begin();
    // What follows, up to end_body(), runs where any of row_mask[batch_size] is non-zero at that point.
    void begin_if(const int32_t* row_mask, int64_t batch_size);
    // What follows runs until no entry of active[batch_size] is non-zero, at least once and at most set_steps() times.
    void begin_while(const int32_t* active, int64_t batch_size);
    void end_body();
    void finish();
    // Gives a capture up, from outside: after an exception between begin() and finish().
    void abandon();

    // Where to launch next: the stream of the innermost open body.
    cudaStream_t stream() const;
    bool capturing() const { return !open_.empty(); }

    void set_steps(int32_t steps, cudaStream_t stream);
    void launch(cudaStream_t stream);

  private:
    struct Body {
        cudaStream_t stream;
        // of a WHILE body, whose last node sets its condition
        cudaGraphConditionalHandle condition;
        const int32_t* active;  // null for the graph itself and for an IF body
        int64_t batch_size;
    };

    void open_body(cudaGraphConditionalNodeType type, cudaGraphConditionalHandle handle, const Body& body);
    void release();
    template <class Function>
    void guarded(Function function);

    const int device_;
    std::vector<Body> open_;  // the graph itself, then the bodies that are open now
    cudaGraph_t graph_ = nullptr;
    cudaGraphExec_t executable_ = nullptr;
    DeviceMemory steps_left_;
};

}  // namespace skipkernels::cuda
