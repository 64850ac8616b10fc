// The kernels of csrc/cuda for the tests: a program's instructions one at a time, or all in one graph in which kernels
// overlap. Knows nothing of the executor.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace py = pybind11;
using namespace skipkernels;

namespace {

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorName(error));
}

class Kernels {
  public:
    // Every attention prefetches `prefetch`, a range of readable bytes, where blocks are idle.
    Kernels(const std::vector<Instruction>& program, int num_sms, cuda::WeightRange prefetch, int64_t max_bytes)
        : num_sms_(num_sms) {
        for (const Instruction& ins : program) {
            cuda::check(ins);
            // exact sizes: AddressSanitizer guards what is behind
            arrivals_.emplace_back(new int32_t[cuda::num_arrivals(ins)]());
            scratch_.emplace_back(new float[cuda::scratch_floats(ins)]);
            for (int64_t i = 0; i < cuda::scratch_floats(ins); ++i) {
                scratch_.back()[i] = std::numeric_limits<float>::quiet_NaN();
            }
            cuda::Step step{ins, {}, false, arrivals_.back().get(), scratch_.back().get()};
            const size_t at = steps_.size();
            step.flags_are_settled = true;
            for (size_t i = at >= 2 ? at - 2 : 0; i < at; ++i) {
                const bool may_still_run = i + 1 == at || program[i + 1].op == OpCode::skip_gate;
                if (may_still_run && cuda::may_write_flags(program[i], ins)) step.flags_are_settled = false;
            }
            step.prefetch = {prefetch, ins.when, ins.num_rows, prefetch, prefetch, max_bytes};
            steps_.push_back(step);
        }
    }

    void launch(int64_t index) const { check(cuda::launch(steps_.at(index), {nullptr, num_sms_, false})); }

    // The whole program as a graph whose kernels may start before the one before them has ended.
    void launch_overlapped() const {
        cudaStream_t stream{};
        cudaGraph_t graph{};
        cudaGraphExec_t executable{};
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (const cuda::Step& step : steps_) {
            check(cuda::launch(step, {stream, num_sms_, &step != &steps_.front()}));
        }
        check(cudaStreamEndCapture(stream, &graph));
        check(cudaGraphInstantiate(&executable, graph, 0));
        check(cudaGraphLaunch(executable, stream));
        check(cudaStreamSynchronize(stream));
        check(cudaGraphExecDestroy(executable));
        check(cudaGraphDestroy(graph));
        check(cudaStreamDestroy(stream));
    }

    bool arrivals_are_zero() const {
        for (size_t i = 0; i < steps_.size(); ++i) {
            for (int64_t j = 0; j < cuda::num_arrivals(steps_[i].ins); ++j) {
                if (arrivals_[i][j]) return false;
            }
        }
        return true;
    }

  private:
    int num_sms_;
    std::vector<cuda::Step> steps_;
    std::vector<std::unique_ptr<int32_t[]>> arrivals_;
    std::vector<std::unique_ptr<float[]>> scratch_;
};

}  // namespace

PYBIND11_MODULE(kernels, m) {
    py::class_<Kernels>(m, "Kernels")
        .def(py::init([](const std::vector<Instruction>& program, int num_sms, uintptr_t prefetch, int64_t bytes) {
                 return new Kernels(program, num_sms, {reinterpret_cast<const void*>(prefetch), bytes}, bytes);
             }),
             py::arg("program"), py::arg("num_sms"), py::arg("prefetch") = 0, py::arg("prefetch_bytes") = 0)
        .def("launch", &Kernels::launch)
        .def("launch_overlapped", &Kernels::launch_overlapped)
        .def("arrivals_are_zero", &Kernels::arrivals_are_zero);
}
