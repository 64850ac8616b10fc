"""CudaSupport: which parts of the GPU runtime are usable on this machine, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from skipkernels.errors import DeviceError

CONDITIONAL_NODES = 12040
"""The driver's CUDA version, as 1000 * major + 10 * minor, that brought conditional graph nodes."""
_OLDEST_CAPABILITY = (8, 0)
CAPTURED = "torch's current stream is being captured into a graph; load and use engines outside of captures"


@dataclass(frozen=True)
class CudaSupport:
    """For each part: None where it is usable, else the reason why not."""

    device: str | None
    kernels: dict[str, str | None]  # in order of preference
    if_node: str | None
    while_node: str | None

    @classmethod
    def probe(cls, device: str = "cuda") -> CudaSupport:
        """Asks torch, the extension and Triton. Costs the start of the CUDA driver where there is one."""
        from skipkernels import _C

        no_device = _device_missing(device)
        not_built = None
        if not _C.cuda_built:
            not_built = f"the CUDA part of the extension is not built ({_C.build_note})"
        no_triton = None
        if find_spec("triton") is None:
            no_triton = "triton is not installed: pip install skipkernels[triton]"
        old_driver = None if no_device else _driver_missing()
        torch_has_if = hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node")
        no_if = not_built if not torch_has_if else None
        return cls(
            device=no_device,
            kernels={"cuda": not_built or no_device, "triton": no_triton or no_device},
            if_node=no_device or old_driver or no_if,
            while_node=no_device or old_driver or not_built,
        )


def current_stream_is_captured(device: torch.device | str) -> bool:
    with torch.cuda.device(device):  # torch asks of the current device alone
        return torch.cuda.is_current_stream_capturing()


def refuse_while_capturing(device: torch.device | str) -> None:
    """
    Raises:
        DeviceError: ``device`` is a GPU, and torch's current stream there is being captured.
    """
    if torch.device(device).type == "cuda" and current_stream_is_captured(device):
        raise DeviceError(CAPTURED)


def _device_missing(device: str) -> str | None:
    if not torch.cuda.is_available():
        reason = "finds no GPU" if torch.version.cuda else "is built without CUDA"
        return f"torch {torch.__version__} {reason}; device 'cpu' needs none"
    index = torch.device(device).index
    if index is None:  # 'cuda' alone is the current one
        index = torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} GPUs, numbered from 0"
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST_CAPABILITY:
        return f"its compute capability is {capability[0]}.{capability[1]}, the kernels need 8.0 or newer"
    return None


def _driver_missing() -> str | None:
    version = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # only in CUDA builds
    if version >= CONDITIONAL_NODES:
        return None
    return f"the driver supports CUDA {version // 1000}.{version % 1000 // 10}, conditional graph nodes need 12.4"
