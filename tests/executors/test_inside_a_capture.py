"""An engine is refused inside somebody's capture of a graph before anything is touched."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from skipkernels import Engine, engine
from skipkernels.errors import DeviceError
from skipkernels.executors.execution import Execution
from skipkernels.executors.support import CudaSupport
from tests.models import tiny_module


@pytest.fixture(autouse=True)
def _captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which everything is usable, and whose current stream is being captured."""
    usable = CudaSupport(device=None, kernels={"cuda": None}, if_node=None, while_node=None)
    monkeypatch.setattr(CudaSupport, "probe", lambda device="cuda": usable)
    devices: list[Any] = []

    @contextmanager
    def use(device: Any) -> Any:
        devices.append(device)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device", use)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: devices[-1] == "cuda:1")


def test_a_module_keeps_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    def pack_module(*_: object) -> None:
        raise AssertionError("the module was packed")

    monkeypatch.setattr(engine, "pack_module", pack_module)
    module = tiny_module()
    before = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    with pytest.raises(DeviceError, match="being captured into a graph"):
        Engine.from_pretrained(module, device="cuda:1")
    assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == before


def test_nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Engine.from_pretrained(tiny_module(), max_seq_len=8)
    monkeypatch.setattr(engine.DecodeState, "allocate", lambda *_, **__: pytest.fail("buffers were allocated"))
    with pytest.raises(DeviceError, match="being captured into a graph"):
        Engine(cpu.config, cpu.weights, max_seq_len=8, execution=Execution(device="cuda:1"))


def test_a_capture_on_another_device_is_none_of_ours() -> None:
    cpu = Engine.from_pretrained(tiny_module(), max_seq_len=8)
    with pytest.raises(DeviceError, match="the weights are on cpu"):  # the check behind ours
        Engine(cpu.config, cpu.weights, max_seq_len=8, execution=Execution(device="cuda:0"))
