"""Streams are named by handles. Work is done when somebody waits for the right one: 0 is a stream like others, and only
together with its device is it one stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skipkernels import SkipPolicy
from skipkernels.errors import DeviceError
from skipkernels.executors import runtime as runtimes
from skipkernels.executors.graph import GraphExecutor
from skipkernels.executors.runtime import CudaRuntime, torch_stream
from skipkernels.kernels import triton as triton_ops
from tests.executors.graph.conftest import FakeDevice, GpuEngine
from tests.models import random_prompt, tiny_engine

PROMPT = random_prompt(9, 1)
SKIPPING = SkipPolicy(threshold=0.6, span=1, cold_start=0, cold_end=1, warmup_tokens=3)
LOOPS = pytest.mark.parametrize("loop", ["replay", "while"])


@pytest.fixture(params=["default stream", "side stream"])
def lazy(request: pytest.FixtureRequest, device: FakeDevice) -> FakeDevice:
    """A device that works only when it is waited for or asked, and a user who is on one of torch's streams."""
    device.controls.configure(asynchronous=1)
    device.user_stream = device.controls.new_stream() if request.param == "side stream" else 0
    return device


@LOOPS
def test_a_generation_waits_for_the_tokens_and_for_the_end(gpu_engine: GpuEngine, lazy: FakeDevice, loop: str) -> None:
    expected = tiny_engine(policy=SKIPPING).generate([PROMPT], max_new_tokens=8)[0]
    engine = gpu_engine(loop=loop, policy=SKIPPING)
    for _ in range(2):
        (answer,) = engine.generate([PROMPT], max_new_tokens=8)
        assert answer.token_ids == expected.token_ids
        assert not lazy.busy(lazy.user_stream)


@LOOPS
def test_an_abandoned_stream_has_come_to_rest(gpu_engine: GpuEngine, lazy: FakeDevice, loop: str) -> None:
    stream = gpu_engine(loop=loop).stream(PROMPT, max_new_tokens=30)
    next(stream)
    stream.close()  # type: ignore[attr-defined]  # a generator
    assert not lazy.busy(lazy.user_stream)


def test_a_profile_times_what_was_done_not_what_was_enqueued(gpu_engine: GpuEngine, lazy: FakeDevice) -> None:
    engine = gpu_engine(policy=SKIPPING)
    decoding = engine.begin(PROMPT, max_new_tokens=10)
    decoding.step(2)
    executor = engine.executor_for(engine.policy)
    assert isinstance(executor, GraphExecutor)
    lazy.controls.clear_log()
    before = {name: buffer.clone() for name, buffer in engine.state.buffers()}
    executor.profile(3)
    assert len(lazy.controls.kernels) == 4 * len(executor.program)  # one launch of each op's graph warms up
    assert not lazy.busy(lazy.user_stream)
    for name, buffer in before.items():
        if not name.endswith("_cache"):
            assert torch.equal(buffer.nan_to_num(), getattr(engine.state, name).nan_to_num()), name


def test_an_instruction_is_done_when_the_call_returns(gpu_engine: GpuEngine, lazy: FakeDevice) -> None:
    engine = gpu_engine()
    engine.begin(PROMPT, max_new_tokens=3).step(1)
    executor = engine.executor_for(engine.policy)
    engine.state.hidden_states.fill_(float("nan"))
    assert isinstance(executor, GraphExecutor)
    executor.run_instruction(0)
    assert engine.state.active.tolist().count(1) == 1
    assert engine.state.hidden_states[engine.state.active != 0].isfinite().all()


def test_a_stream_is_busy_until_its_work_is_done(gpu_engine: GpuEngine, lazy: FakeDevice) -> None:
    graph, stream = lazy.graph(), lazy.user_stream
    active = torch.zeros(1, dtype=torch.int32)
    with graph.capture(), graph.while_any(active):
        pass
    graph.set_steps(3, stream)
    graph.launch(stream)
    assert [lazy.busy(stream) for _ in range(3)] == [True, True, False]
    graph.launch(stream)
    lazy.synchronize(stream)
    assert not lazy.busy(stream)


@pytest.mark.parametrize("index", [0, 1])
def test_handle_0_is_a_stream_of_the_engines_device(gpu_engine: GpuEngine, device: FakeDevice, index: int) -> None:
    """There go launches, captures and waits, whichever device is current; and that one is current again afterwards."""
    device.controls.configure(device_count=2, asynchronous=1)
    second = FakeDevice(device.native, device.controls, index)
    engine = gpu_engine(device=second, policy=SKIPPING, conditional="if_node", loop="while")
    expected = tiny_engine(policy=SKIPPING).generate([PROMPT], max_new_tokens=6)[0].token_ids
    assert engine.generate([PROMPT], max_new_tokens=6)[0].token_ids == expected
    assert device.controls.device == 0


def test_a_stream_that_is_captured_is_refused(gpu_engine: GpuEngine, device: FakeDevice) -> None:
    engine = gpu_engine()
    engine.begin(PROMPT, max_new_tokens=3).step(1)
    executor = engine.executor_for(engine.policy)
    somebodys = device.native.CudaGraph(0)
    somebodys.begin()
    device.user_stream = somebodys.stream
    for attempt in (lambda: executor.run(2), lambda: engine.executor_for(SKIPPING)):
        with pytest.raises(DeviceError, match="being captured into a graph"):
            attempt()
    somebodys.finish()  # its capture was not broken
    device.user_stream = 0
    assert len(executor.run(2)) == 2


def test_a_device_without_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="cuda names no GPU"):
        CudaRuntime(torch.device("cuda"))


class FakeStream:
    """torch's object: of the pool, external, or the default one."""

    def __init__(self, handle: int, name: str) -> None:
        self.cuda_stream, self.name, self.waited = handle, name, 0

    def synchronize(self) -> None:
        self.waited += 1

    def query(self) -> bool:
        return self.name == "default"


@pytest.fixture
def torch_cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch.cuda does with handles: its ExternalStream(0) is a new stream of the pool (pytorch issue 182960)."""
    default, current = FakeStream(0, "default"), []

    @contextmanager
    def use(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    fake = SimpleNamespace(
        default_stream=lambda device: default,
        ExternalStream=lambda handle, device: FakeStream(handle or 0xBEEF, "external" if handle else "pool"),
        stream=use,
        Stream=FakeStream,
        current=current,
    )
    monkeypatch.setattr(runtimes.torch, "cuda", fake)
    return fake


def test_torchs_object_for_handle_0_is_the_default_stream(torch_cuda: SimpleNamespace) -> None:
    device = torch.device("cuda", 0)
    assert torch_stream(0, device).name == "default"  # type: ignore[attr-defined]  # the fake
    assert torch_stream(48, device).cuda_stream == 48


@pytest.mark.parametrize(("handle", "name"), [(0, "default"), (48, "external")])
def test_triton_launches_on_the_stream_it_is_given(
    torch_cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, handle: int, name: str
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(triton_ops, "TRITON", {"embed": lambda ins: ran.append(torch_cuda.current[-1].name)})
    program: Any = (SimpleNamespace(op="embed"),)
    state: Any = None
    CudaRuntime(torch.device("cuda", 0)).launcher(program, state, "triton").launch(0, handle, False)
    assert ran == [name]


def test_without_the_extension_torch_waits_for_the_same_stream(torch_cuda: SimpleNamespace) -> None:
    runtime = CudaRuntime(torch.device("cuda", 0))
    runtime.native = SimpleNamespace(cuda_built=False)  # type: ignore[assignment]  # a stand-in
    runtime.synchronize(0)
    assert torch_cuda.default_stream(None).waited == 1
    assert not runtime.busy(0)
    assert runtime.busy(48)
