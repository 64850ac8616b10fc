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

#include "cuda/plan.h"

namespace py = pybind11;
using namespace skipkernels;

namespace {

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorName(error));
}

class Kernels {
  public:
    Kernels(const std::vector<Instruction>& program, int num_sms, const cuda::Options& options) : num_sms_(num_sms) {
        for (const Instruction& ins : program) cuda::check(ins);
        steps_ = cuda::plan_steps(program, options, options.max_prefetch_bytes);
        stamps_.assign(steps_.size() * cuda::kStamps, 0);
        for (size_t i = 0; i < stamps_.size(); ++i) stamps_[i] = i % cuda::kStamps < 2 ? ~0ull : 0;
        for (cuda::Step& step : steps_) {
            const Instruction& ins = step.ins;
            // exact sizes: AddressSanitizer guards what is behind
            arrivals_.emplace_back(new int32_t[cuda::num_arrivals(ins)]());
            scratch_.emplace_back(new float[cuda::scratch_floats(ins)]);
            for (int64_t i = 0; i < cuda::scratch_floats(ins); ++i) {
                scratch_.back()[i] = std::numeric_limits<float>::quiet_NaN();
            }
            step.arrivals = arrivals_.back().get();
            step.scratch = scratch_.back().get();
        }
    }

    void launch(int64_t index) const {
        cuda::Step step = steps_.at(index);
        step.takes_gate_along = false;
        check(cuda::launch(step, {nullptr, num_sms_, false, -1, nullptr}));
    }

    // The whole program as a graph whose kernels may start before the one before them has ended.
    void launch_overlapped() {
        cudaStream_t stream{};
        cudaGraph_t graph{};
        cudaGraphExec_t executable{};
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (size_t i = 0; i < steps_.size(); ++i) {
            if (steps_[i].is_taken_along) continue;
            check(cuda::launch(steps_[i], {stream, num_sms_, i > 0, 71, &stamps_[i * cuda::kStamps]}));
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

    // {first block, first wait over, last end} of each instruction's kernel in launch_overlapped()
    const std::vector<unsigned long long>& stamps() const { return stamps_; }
    // Breaks the plan: for tests that want to see that this shows.
    void break_plan(const std::string& how) {
        for (cuda::Step& step : steps_) {
            if (how == "flags are said to be settled") step.flags_are_settled = true;
            if (how == "prefetches before the wait") step.prefetches_early = true;
        }
    }

  private:
    int num_sms_;
    std::vector<unsigned long long> stamps_;
    std::vector<cuda::Step> steps_;
    std::vector<std::unique_ptr<int32_t[]>> arrivals_;
    std::vector<std::unique_ptr<float[]>> scratch_;
};

}  // namespace

PYBIND11_MODULE(kernels, m) {
    // local: the library is loaded in several variants, each with a runtime of its own
    py::class_<Kernels>(m, "Kernels", py::module_local())
        .def(py::init([](const std::vector<Instruction>& program, int num_sms, const py::dict& given) {
                 cuda::Options options;
                 options.max_prefetch_bytes = 5000;
                 const std::pair<const char*, bool*> switches[] = {
                     {"gate_beside_qkv", &options.gate_beside_qkv},
                     {"late_prefetch", &options.late_prefetch},
                     {"evict_first", &options.evict_first},
                     {"early_trigger", &options.early_trigger},
                     {"touch_settled", &options.touch_settled},
                     {"prefetch_first_layer", &options.prefetch_first_layer},
                 };
                 for (const auto& [name, value] : switches) {
                     if (given.contains(name)) *value = given[name].cast<bool>();
                 }
                 return new Kernels(program, num_sms, options);
             }),
             py::arg("program"), py::arg("num_sms"), py::arg("options"))
        .def("stamps", &Kernels::stamps)
        .def("break_plan", &Kernels::break_plan)
        .def("launch", &Kernels::launch)
        .def("launch_overlapped", &Kernels::launch_overlapped)
        .def("arrivals_are_zero", &Kernels::arrivals_are_zero);
}
