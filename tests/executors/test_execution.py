"""What was asked for becomes what can be done here, or an error that says what is missing."""

from __future__ import annotations

import pytest
import torch

from skipkernels.decoding.cache_size import check_memory
from skipkernels.errors import DeviceError
from skipkernels.executors.execution import Execution
from skipkernels.executors.support import CudaSupport
from skipkernels.model.config import ModelConfig
from tests.models import tiny_config

EVERYTHING = CudaSupport(device=None, kernels={"cuda": None, "triton": None}, if_node=None, while_node=None)
NOT_BUILT = CudaSupport(
    device=None,
    kernels={"cuda": "the CUDA part of the extension is not built", "triton": None},
    if_node=None,
    while_node="the CUDA part of the extension is not built",
)
OLD_DRIVER = CudaSupport(
    device=None,
    kernels={"cuda": None, "triton": None},
    if_node="the driver supports CUDA 12.2, conditional graph nodes need 12.4",
    while_node="the driver supports CUDA 12.2, conditional graph nodes need 12.4",
)


def test_auto_on_a_gpu_prefers_the_cuda_kernels() -> None:
    chosen = Execution(device="cuda").resolved(EVERYTHING)
    assert (chosen.executor, chosen.kernels, chosen.conditional, chosen.loop) == (
        "graph",
        "cuda",
        "predicate",
        "replay",
    )
    assert Execution(device="cuda").resolved(NOT_BUILT).kernels == "triton"
    assert Execution().resolved().executor == "cpu"
    assert Execution(executor="reference").resolved().executor == "reference"


def test_what_was_asked_for_stays() -> None:
    asked = Execution(device="cuda:1", kernels="triton", conditional="if_node", loop="while")
    chosen = asked.resolved(EVERYTHING)
    assert (chosen.device, chosen.kernels, chosen.conditional, chosen.loop) == ("cuda:1", "triton", "if_node", "while")
    assert chosen.resolved(EVERYTHING) == chosen


@pytest.mark.parametrize(
    ("options", "support", "message"),
    [
        ({"kernels": "cuda"}, NOT_BUILT, "kernels 'cuda' are not usable: the CUDA part of the extension is not built"),
        ({"loop": "while"}, NOT_BUILT, "loop 'while' is not usable: .*; use loop 'replay'"),
        ({"conditional": "if_node"}, OLD_DRIVER, "need 12.4; use conditional 'predicate'"),
        ({"loop": "while"}, OLD_DRIVER, "need 12.4; use loop 'replay'"),
    ],
)
def test_what_is_missing_is_named(options: dict[str, str], support: CudaSupport, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        Execution(device="cuda", **options).resolved(support)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_part_says_why() -> None:
    support = CudaSupport.probe()
    for reason in (support.device, *support.kernels.values(), support.if_node, support.while_node):
        assert reason
    with pytest.raises(DeviceError, match=r"device 'cuda' is not usable: torch .*; device 'cpu' needs none"):
        Execution(device="cuda").resolved()


def test_a_model_that_does_not_fit_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_hf(tiny_config())
    needed = config.weight_bytes(torch.float32) + config.cache_bytes(1, 100, torch.float32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - 1, 10 * needed))
    with pytest.raises(DeviceError, match=r"the model needs .* GiB .* cache for a sequence of 100 positions.* free of"):
        check_memory(config, torch.float32, 100, "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed, 10 * needed))
    check_memory(config, torch.float32, 100, "cuda")
    check_memory(config, torch.float32, 1 << 40, "cpu")
