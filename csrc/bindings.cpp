// Python's door to the native part. Knows no torch: buffers come as integer addresses, whose owners Python keeps alive.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <tuple>

#include "checks.h"
#include "cpu/bandwidth.h"
#include "cpu/blocks.h"
#include "cpu/executor.h"
#include "program.h"

#ifndef SKIPKERNELS_CUDA_BUILT
#    define SKIPKERNELS_CUDA_BUILT 0
#endif
#if SKIPKERNELS_CUDA_BUILT
#    include "cuda/bindings.h"
#endif
#ifndef SKIPKERNELS_BUILD_NOTE
#    define SKIPKERNELS_BUILD_NOTE "unknown"
#endif

namespace py = pybind11;
using namespace skipkernels;

namespace {

const OpInfo& find_op(const std::string& name) {
    for (const OpInfo& info : kInstructionSet) {
        if (info.name == name) return info;
    }
    fail("unknown op '", name, "'");
}

Format parse_dtype(const std::string& name) {
    if (name == "fp32") return Format::f32;
    if (name == "bf16") return Format::bf16;
    if (name == "fp16") return Format::f16;
    fail("unknown cache dtype '", name, "'; use fp32, bf16 or fp16");
}

Format parse_format(const std::string& name) {
    for (size_t i = 0; i < std::size(kFormatNames); ++i) {
        if (name == kFormatNames[i]) return static_cast<Format>(i);
    }
    fail("unknown matrix format '", name, "'");
}

Format parse_block_format(const std::string& name) {
    const Format format = parse_format(name);
    check(!is_float(format), name, " is no format of blocks");
    return format;
}

Layout parse_layout(const std::string& name) {
    for (size_t i = 0; i < std::size(kLayoutNames); ++i) {
        if (name == kLayoutNames[i]) return static_cast<Layout>(i);
    }
    fail("unknown matrix layout '", name, "'");
}

using Parts = std::vector<std::tuple<uintptr_t, std::string, std::string, int64_t>>;  // address, format, layout, rows

Matrix make_matrix(const Parts& parts) {
    check(!parts.empty() && parts.size() <= Matrix::kMaxParts, "a matrix has 1 to ", Matrix::kMaxParts, " parts, got ",
          parts.size());
    Matrix matrix{};
    for (const auto& [address, format, layout, rows] : parts) {
        matrix.parts[matrix.num_parts++] = {reinterpret_cast<const void*>(address), parse_format(format),
                                            parse_layout(layout), rows};
    }
    matrix.data = matrix.parts[0].data;
    matrix.format = matrix.parts[0].format;
    return matrix;
}

// One op's struct is filled through its field table, so bindings and program.h cannot drift apart.
Instruction make_instruction(const std::string& op, const std::string& dtype, uintptr_t row_mask, int64_t num_rows,
                             const py::dict& operands) {
    const OpInfo& info = find_op(op);
    check(num_rows >= 1, op, ": num_rows must be at least 1, got ", num_rows);
    check(row_mask != 0, op, ": row_mask is a null pointer");
    Instruction ins{};
    ins.op = info.op;
    ins.cache_dtype = parse_dtype(dtype);
    ins.row_mask = reinterpret_cast<const int32_t*>(row_mask);
    ins.num_rows = num_rows;
    char* base = reinterpret_cast<char*>(&ins.embed);  // every member of the union starts here
    check(operands.size() == info.num_fields, op, " takes ", info.num_fields, " operands, got ", operands.size());
    for (const Field* field = info.fields; field != info.fields + info.num_fields; ++field) {
        const py::str key(field->name.data(), field->name.size());
        check(operands.contains(key), op, ": operand '", field->name, "' is missing");
        const py::object value = operands[key];
        char* at = base + field->offset;
        switch (field->kind) {
            case FieldKind::tensor: {
                const auto address = value.cast<uintptr_t>();
                std::memcpy(at, &address, sizeof address);
                break;
            }
            case FieldKind::matrix: {
                const Matrix matrix = make_matrix(value.cast<Parts>());
                std::memcpy(at, &matrix, sizeof matrix);
                break;
            }
            case FieldKind::size:
            case FieldKind::integer: {
                const auto number = value.cast<int64_t>();
                std::memcpy(at, &number, sizeof number);
                break;
            }
            case FieldKind::real: {
                const auto number = value.cast<float>();
                std::memcpy(at, &number, sizeof number);
                break;
            }
        }
    }
    return ins;
}

py::dict instruction_set() {
    static constexpr const char* kKinds[] = {"tensor", "matrix", "size", "int", "float"};
    py::dict ops;
    for (const OpInfo& info : kInstructionSet) {
        py::dict fields;
        for (size_t i = 0; i < info.num_fields; ++i) {
            fields[py::str(std::string(info.fields[i].name))] = kKinds[static_cast<size_t>(info.fields[i].kind)];
        }
        ops[py::str(std::string(info.name))] = fields;
    }
    return ops;
}

constexpr int kMaxThreads = 1024;

void check_threads(int num_threads) {
    check(num_threads >= 1 && num_threads <= kMaxThreads, "num_threads must lie in 1..", kMaxThreads, ", got ",
          num_threads);
}

// An executor's buffers serve one caller at a time. Python code takes turns itself; this catches what does not.
class Turn {
  public:
    explicit Turn(const cpu::Executor& executor) : executor_(&executor) {
        const std::lock_guard lock(mutex());
        check(running().insert(executor_).second, "another thread is running this executor; wait for it");
    }
    ~Turn() {
        const std::lock_guard lock(mutex());
        running().erase(executor_);
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

  private:
    static std::mutex& mutex() {
        static std::mutex instance;
        return instance;
    }
    static std::set<const cpu::Executor*>& running() {
        static std::set<const cpu::Executor*> instance;
        return instance;
    }
    const cpu::Executor* executor_;
};

// The loop runs without the GIL and takes it a few times a second, so that Ctrl-C ends a long generation.
std::vector<double> run_interruptibly(cpu::Executor& executor, int64_t max_steps) {
    using Clock = std::chrono::steady_clock;
    const Turn turn(executor);
    const auto caller = std::this_thread::get_id();
    auto checked = Clock::now();
    bool interrupted = false;
    std::vector<double> seconds;
    {
        py::gil_scoped_release release;
        seconds = executor.run(max_steps, [&] {
            // whichever thread ends a step asks, but Python handles signals on its own thread only
            if (std::this_thread::get_id() != caller || Clock::now() - checked < std::chrono::milliseconds(100))
                return true;
            checked = Clock::now();
            py::gil_scoped_acquire acquire;
            interrupted = PyErr_CheckSignals() != 0;
            return !interrupted;
        });
    }
    if (interrupted) throw py::error_already_set();
    return seconds;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native executors of the decode program.";
    m.attr("cuda_built") = static_cast<bool>(SKIPKERNELS_CUDA_BUILT);
    m.attr("build_note") = SKIPKERNELS_BUILD_NOTE;
    m.attr("rows_per_partial") = cpu::kPanelRows;
    m.def("instruction_set", &instruction_set,
          "The ops of program.h: {op: {field: 'tensor' | 'matrix' | 'size' | 'int' | 'float'}}.");
    m.def("usable_isas", &cpu::usable_isas, "CPU instruction sets usable here, widest first.");
    m.def("advise_huge_pages",
          [](uintptr_t data, size_t bytes) { cpu::advise_huge_pages(reinterpret_cast<void*>(data), bytes); });
    m.def(
        "single_column_bytes",
        [](const std::string& format, int64_t rows, int64_t columns) {
            return cpu::single_column_bytes(parse_block_format(format), rows, columns);
        },
        "Bytes of a column of a matrix of blocks in layout single_columns.");
    m.def(
        "arranged_bytes",
        [](const std::string& layout, const std::string& format, int64_t rows, int64_t columns) {
            return cpu::arranged_bytes(parse_layout(layout), parse_block_format(format), rows, columns);
        },
        py::arg("layout"), py::arg("format"), py::arg("rows"), py::arg("columns"));
    m.def(
        "arrange",
        [](const std::string& layout, const std::string& format, int64_t rows, int64_t columns, uintptr_t source,
           uintptr_t out, int num_threads) {
            check_threads(num_threads);
            cpu::arrange(parse_layout(layout), parse_block_format(format), rows, columns,
                         reinterpret_cast<const uint8_t*>(source), reinterpret_cast<uint8_t*>(out), num_threads);
        },
        py::arg("layout"), py::arg("format"), py::arg("rows"), py::arg("columns"), py::arg("source"), py::arg("out"),
        py::arg("num_threads"), py::call_guard<py::gil_scoped_release>(),
        "Blocks of a GGUF into an order that the kernels read.");
    m.def(
        "dequantize_arranged",
        [](const std::string& layout, const std::string& format, int64_t rows, int64_t columns, uintptr_t data,
           const std::vector<int64_t>& wanted, uintptr_t out) {
            const cpu::ArrangedRows arranged(parse_layout(layout), parse_block_format(format), rows, columns,
                                             reinterpret_cast<const uint8_t*>(data));
            auto* to = reinterpret_cast<float*>(out);
            for (int64_t row : wanted) {
                arranged.dequantize(row, to);
                to += columns;
            }
        },
        py::arg("layout"), py::arg("format"), py::arg("rows"), py::arg("columns"), py::arg("data"), py::arg("wanted"),
        py::arg("out"), "Rows of a matrix in one of the kernels' orders, in fp32.");
    m.attr("max_threads") = kMaxThreads;
    m.def(
        "measure_read",
        [](size_t bytes, int repeats, int num_threads, const std::string& isa) {
            check_threads(num_threads);
            return cpu::measure_read(bytes, repeats, num_threads, isa);
        },
        py::arg("bytes"), py::arg("repeats"), py::arg("num_threads"), py::arg("isa") = "auto",
        py::call_guard<py::gil_scoped_release>(), "Seconds of each of `repeats` full reads of `bytes` of memory.");

    py::class_<Instruction>(m, "Instruction")
        .def(py::init(&make_instruction), py::arg("op"), py::arg("dtype"), py::arg("row_mask"), py::arg("num_rows"),
             py::arg("operands"));

    py::class_<cpu::Executor>(m, "CpuExecutor")
        .def(py::init([](std::vector<Instruction> program, uintptr_t active, int64_t num_rows, int num_threads,
                         const std::string& isa) {
                 check_threads(num_threads);
                 return std::make_unique<cpu::Executor>(std::move(program), reinterpret_cast<const int32_t*>(active),
                                                        num_rows, num_threads, isa);
             }),
             py::arg("program"), py::arg("active"), py::arg("num_rows"), py::arg("num_threads"),
             py::arg("isa") = "auto")
        .def("run", &run_interruptibly, py::arg("max_steps"))
        .def("interrupt", &cpu::Executor::interrupt)
        .def("run_instruction", &cpu::Executor::run_instruction, py::arg("index"),
             py::call_guard<py::gil_scoped_release>())
        .def("set_profiling", &cpu::Executor::set_profiling, py::arg("on"))
        .def_property_readonly("profile", &cpu::Executor::profile)
        .def_property_readonly("num_threads", &cpu::Executor::num_threads)
        .def_property_readonly("isa", &cpu::Executor::isa);

#if SKIPKERNELS_CUDA_BUILT
    cuda::bind(m);
#endif
}
