// Python's door to the CUDA part. Streams and addresses come as integers.
#include "bindings.h"

#include <pybind11/stl.h>

#include "device.h"
#include "graph.h"
#include "launcher.h"
#include "streams.h"

namespace py = pybind11;

namespace skipkernels::cuda {

namespace {

cudaStream_t as_stream(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }
const int32_t* as_flags(uintptr_t address) { return reinterpret_cast<const int32_t*>(address); }

// What the machine offers. `error` says why there is no device, in the runtime's words.
py::dict status() {
    py::dict facts;
    int driver = 0, runtime = 0, devices = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    const cudaError_t error = cudaGetDeviceCount(&devices);
    cudaGetLastError();
    facts["driver_version"] = driver;  // as 1000 * major + 10 * minor; 0: no driver
    facts["runtime_version"] = runtime;
    facts["device_count"] = error == cudaSuccess ? devices : 0;
    facts["error"] = error == cudaSuccess ? py::object(py::none()) : py::str(cudaGetErrorString(error));
    return facts;
}

// What figures of a device are compared with.
py::dict device_facts(int device) {
    py::dict facts;
    facts["sms"] = attribute_of(device, cudaDevAttrMultiProcessorCount);
    facts["l2_bytes"] = attribute_of(device, cudaDevAttrL2CacheSize);
    // two transfers a clock, in kHz, of a bus of so many bits
    facts["peak_gb_per_s"] = 2e3 * attribute_of(device, cudaDevAttrMemoryClockRate) *
                             attribute_of(device, cudaDevAttrGlobalMemoryBusWidth) / 8 / 1e9;
    return facts;
}

}  // namespace

void bind(py::module_& m) {
    py::register_local_exception<InstantiationError>(m, "CudaInstantiationError", PyExc_RuntimeError);
    m.def("cuda_status", &status, "Driver and runtime versions, number of devices, and why there is none.");

    m.def("cuda_device", &device_facts, py::arg("device"),
          "Multiprocessors, bytes of L2, and the memory's peak bandwidth.");
    m.def(
        "cuda_synchronize", [](uintptr_t stream, int device) { synchronize(as_stream(stream), device); },
        py::arg("stream"), py::arg("device"), py::call_guard<py::gil_scoped_release>(),
        "Waits for a stream; 0 is the device's default stream.");
    m.def(
        "cuda_is_busy", [](uintptr_t stream, int device) { return is_busy(as_stream(stream), device); },
        py::arg("stream"), py::arg("device"));
    m.def(
        "cuda_is_capturing", [](uintptr_t stream, int device) { return is_capturing(as_stream(stream), device); },
        py::arg("stream"), py::arg("device"));

    py::class_<Options>(m, "CudaOptions", "See csrc/cuda/plan.h.")
        .def(py::init<>())
        .def_readwrite("gate_beside_qkv", &Options::gate_beside_qkv)
        .def_readwrite("late_prefetch", &Options::late_prefetch)
        .def_readwrite("max_prefetch_bytes", &Options::max_prefetch_bytes)
        .def_readwrite("evict_first", &Options::evict_first)
        .def_readwrite("early_trigger", &Options::early_trigger)
        .def_readwrite("one_carveout", &Options::one_carveout)
        .def_readwrite("touch_settled", &Options::touch_settled)
        .def_readwrite("prefetch_first_layer", &Options::prefetch_first_layer);

    py::class_<Launcher>(m, "CudaLauncher", "Launches single instructions of a program.")
        .def(
            py::init([](const std::vector<Instruction>& program, int device, const Options& options, uintptr_t stamps) {
                return new Launcher(program, device, options, reinterpret_cast<Stamps>(stamps));
            }),
            py::arg("program"), py::arg("device"), py::arg("options") = Options{}, py::arg("stamps") = 0)
        .def(
            "launch",
            [](const Launcher& self, int64_t index, uintptr_t stream, bool programmatic) {
                self.launch(index, as_stream(stream), programmatic);
            },
            py::arg("index"), py::arg("stream"), py::arg("programmatic"))
        .def(
            "launch_in_step",
            [](const Launcher& self, int64_t index, uintptr_t stream, bool programmatic) {
                return self.launch_in_step(index, as_stream(stream), programmatic);
            },
            py::arg("index"), py::arg("stream"), py::arg("programmatic"));

    py::class_<Graph>(m, "CudaGraph", "Captures launches, with IF and WHILE bodies; see csrc/cuda/graph.h.")
        .def(py::init<int>(), py::arg("device"))
        .def("begin", &Graph::begin)
        .def(
            "begin_if",
            [](Graph& self, uintptr_t row_mask, int64_t batch_size) { self.begin_if(as_flags(row_mask), batch_size); },
            py::arg("row_mask"), py::arg("batch_size"))
        .def(
            "begin_while",
            [](Graph& self, uintptr_t active, int64_t batch_size) { self.begin_while(as_flags(active), batch_size); },
            py::arg("active"), py::arg("batch_size"))
        .def("end_body", &Graph::end_body)
        .def("finish", &Graph::finish)
        .def("abandon", &Graph::abandon)
        .def_property_readonly("stream", [](const Graph& self) { return reinterpret_cast<uintptr_t>(self.stream()); })
        .def(
            "set_steps", [](Graph& self, int32_t steps, uintptr_t stream) { self.set_steps(steps, as_stream(stream)); },
            py::arg("steps"), py::arg("stream"))
        .def(
            "launch", [](Graph& self, uintptr_t stream) { self.launch(as_stream(stream)); }, py::arg("stream"),
            py::call_guard<py::gil_scoped_release>());
}

}  // namespace skipkernels::cuda
