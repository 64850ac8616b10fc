"""How a program becomes a graph: the order of the calls, one handle a node, and what is left after an error."""

from __future__ import annotations

import gc

import pytest
import torch

from skipkernels.errors import DeviceError
from skipkernels.executors.execution import Execution
from skipkernels.executors.graph import GraphExecutor
from skipkernels.executors.kernel_options import KernelOptions
from skipkernels.model.config import ModelConfig
from skipkernels.model.weights import allocate_weights
from skipkernels.program import build_program
from skipkernels.program.state import LAYOUTS, DecodeState
from skipkernels.skipping.policy import DensePolicy, Policy, SkipPolicy
from tests.executors.graph.conftest import FakeDevice
from tests.models import tiny_config

LAYERS = 4
CAPTURE_CALLS = (
    "cudaStreamBeginCapture",
    "cudaStreamGetCaptureInfo",
    "cudaGraphConditionalHandleCreate",
    "cudaGraphAddNode",
    "cudaStreamUpdateCaptureDependencies",
    "cudaStreamBeginCaptureToGraph",
    "cudaStreamEndCapture",
    "cudaGraphInstantiate",
)
EVERY_LAYER_MAY_SKIP = SkipPolicy(threshold=0.5, cold_start=0, cold_end=0, warmup_tokens=0)


def executor(
    device: FakeDevice,
    conditional: str = "predicate",
    loop: str = "replay",
    policy: Policy = EVERY_LAYER_MAY_SKIP,
) -> GraphExecutor:
    config = ModelConfig.from_hf(tiny_config())
    weights = allocate_weights(config, torch.float32, 16)
    state = DecodeState.allocate(config, num_sequences=2, max_seq_len=16, dtype=torch.float32, layout=LAYOUTS["cuda"])
    program = build_program(config, weights, state, gated=policy.plan(LAYERS) is not None)
    execution = Execution("cuda", "graph", kernels="cuda", conditional=conditional, loop=loop)
    return GraphExecutor(program, state, execution, device)


def begin(executor: GraphExecutor) -> None:
    """A sequence of two tokens, which is to get four more."""
    state = executor.state
    state.begin_sequence(0, torch.tensor([3, 5], dtype=torch.int32))
    state.set_blocks(0, [0])
    state.max_new_tokens.fill_(4)
    state.start_decoding(0)


def capture_calls(device: FakeDevice) -> list[str]:
    names = {f"{name}{suffix}": name for name in CAPTURE_CALLS for suffix in ("", "_v2", "_v3")}
    names["cudaGraphInstantiateWithFlags"] = "cudaGraphInstantiate"
    return [names[call.name] for call in device.controls.log if call.name in names]


def test_a_predicated_program_is_one_capture(device: FakeDevice) -> None:
    executor(device)
    assert capture_calls(device) == ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"]


IF_NODE = [
    "cudaStreamGetCaptureInfo",  # which graph the handle is for
    "cudaGraphConditionalHandleCreate",
    "cudaStreamGetCaptureInfo",  # again: the kernel that sets the condition is among the dependencies now
    "cudaGraphAddNode",
    "cudaStreamUpdateCaptureDependencies",
    "cudaStreamBeginCaptureToGraph",
    "cudaStreamEndCapture",
]


def test_an_if_node_stands_around_each_ffn(device: FakeDevice) -> None:
    executor(device, "if_node")
    expected = ["cudaStreamBeginCapture", *IF_NODE * LAYERS, "cudaStreamEndCapture", "cudaGraphInstantiate"]
    assert capture_calls(device) == expected


def test_a_while_node_stands_around_the_step(device: FakeDevice) -> None:
    executor(device, "if_node", "while")
    opened, closed = IF_NODE[:-1], IF_NODE[-1:]
    body = [*opened, *IF_NODE * LAYERS, *closed]
    assert capture_calls(device) == ["cudaStreamBeginCapture", *body, "cudaStreamEndCapture", "cudaGraphInstantiate"]


def test_every_conditional_node_has_a_handle_of_its_own(device: FakeDevice) -> None:
    executor(device, "if_node", "while")
    calls = capture_calls(device)
    assert calls.count("cudaGraphConditionalHandleCreate") == calls.count("cudaGraphAddNode") == LAYERS + 1


def test_a_dense_program_has_its_ffns_in_if_nodes_too(device: FakeDevice) -> None:
    """A finished row wants no FFN either: the predicate is the row's own flag, whatever the policy."""
    executor(device, "if_node", policy=DensePolicy())
    assert capture_calls(device).count("cudaGraphAddNode") == LAYERS


@pytest.mark.parametrize("function", ["cudaMalloc", "cudaStreamCreateWithFlags", "cudaLaunchKernelEx", *CAPTURE_CALLS])
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_an_error_leaves_nothing_behind_and_the_device_usable(device: FakeDevice, function: str, nth: int) -> None:
    gc.collect()
    before = device.controls.live
    device.controls.clear_log()
    executor(device, "if_node", "while")
    gc.collect()
    for name in (function, f"{function}_v2"):  # as it is called by CUDA 12
        device.controls.inject(name, "cudaErrorUnknown", nth=nth)
        if function == "cudaGraphInstantiate":  # the second one is without programmatic edges
            device.controls.inject(name, "cudaErrorUnknown", nth=nth + 1)
    calls = [call.name for call in device.controls.log]
    if calls.count(function) + calls.count(f"{function}_v2") >= nth:
        with pytest.raises(DeviceError, match="cudaErrorUnknown"):
            executor(device, "if_node", "while")
    gc.collect()
    assert device.controls.live == before
    device.controls.reset()
    executor(device, "if_node", "while")


@pytest.mark.parametrize(("conditional", "loop"), [("if_node", "replay"), ("predicate", "while")])
def test_bodies_without_programmatic_edges_where_the_driver_refuses_them(
    device: FakeDevice, conditional: str, loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert executor(device, conditional, loop).overlaps
    assert not caplog.records
    device.controls.configure(programmatic_in_bodies=0)
    refused = executor(device, conditional, loop)
    assert not refused.overlaps
    assert "kernels do not overlap" in caplog.text
    begin(refused)
    assert len(refused.run(9)) == 4


def test_a_predicated_graph_overlaps_where_bodies_must_not(device: FakeDevice) -> None:
    device.controls.configure(programmatic_in_bodies=0)
    assert executor(device).overlaps


@pytest.mark.parametrize("one", [True, False])
def test_all_kernels_ask_for_one_carve_out(device: FakeDevice, one: bool) -> None:
    """An SM changes it only when it is idle: a kernel with another one would have to wait for all others to leave."""
    options = KernelOptions(one_carveout=one)
    executor(FakeDevice(device.native, device.controls, options=options), "if_node", "while").run(1)
    asked = [call.arguments.split(", ") for call in device.controls.log if call.name == "cudaFuncSetAttribute"]
    carveouts = {(", ".join(name), value) for *name, attribute, value in asked if attribute == "9"}
    conditions = {"if_any", "while_any"}
    of_steps = {value for name, value in carveouts if not any(condition in name for condition in conditions)}
    assert of_steps == {"71" if one else "-1"}  # of 228 KB: 164 KB is the next size that exists
    assert {value for name, value in carveouts} - of_steps <= {"71"}
    launched = {call.arguments for call in device.controls.log if call.name == "cudaLaunchKernelEx"}
    assert launched <= {name for name, _ in carveouts}


@pytest.mark.parametrize("beside", [True, False])
def test_the_gate_is_a_block_of_the_kernel_behind_it(device: FakeDevice, beside: bool) -> None:
    options = KernelOptions(gate_beside_qkv=beside)
    ours = executor(FakeDevice(device.native, device.controls, options=options))
    gates = [index for index, ins in enumerate(ours.program) if ins.op == "skip_gate"]
    begin(ours)
    device.controls.clear_log()
    ours.run(1)
    assert sum("skip_gate_kernel" in name for name in device.controls.kernels) == (0 if beside else len(gates))
    device.controls.clear_log()
    ours.run_instruction(gates[0])  # alone it is a kernel
    assert ["skip_gate_kernel" in name for name in device.controls.kernels] == [True]


def test_a_second_capture_into_the_same_graph_is_refused(device: FakeDevice) -> None:
    graph = device.native.CudaGraph(0)
    graph.begin()
    with pytest.raises(RuntimeError, match="before the first has ended"):
        graph.begin()
    graph.abandon()
    graph.begin()
    graph.finish()


def test_what_is_not_in_order_is_refused(device: FakeDevice) -> None:
    graph = device.native.CudaGraph(0)
    for call in (graph.finish, graph.end_body, lambda: graph.stream, lambda: graph.launch(0)):
        with pytest.raises(RuntimeError, match=r"no capture has begun|no body is open|nothing has been captured"):
            call()
