#include "runtime.h"

#include <cstdlib>
#include <cstring>

#include "graph.h"

namespace cuda_host {

Runtime runtime;

Runtime::Runtime() = default;
Runtime::~Runtime() = default;

void Runtime::reset() {
    for (auto* memory : {&device_memory, &host_memory}) {
        for (const auto& [p, bytes] : *memory) {
            std::memset(p, 0xff, bytes);  // what is read of it from here on is NaN
            outlived_memory.emplace_back(p, &std::free);
        }
        memory->clear();
    }
    settings = {};
    log.clear();
    injected.clear();
    last_error = sticky_error = cudaSuccess;
    failure.clear();
    max_shared_bytes.clear();
    handles.clear();
    execs.clear();
    graphs.clear();
    bodies.clear();
    events.clear();
    streams.clear();
    forget_streams();
    device = 0;
}

}  // namespace cuda_host
