"""A test's hands on the fake CUDA runtime inside a library that build.py made."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # what run_under_asan() starts is faster without

SEEDS = range(6)  # ascending, descending, and four shuffled schedules


@dataclass(frozen=True)
class Call:
    """An API call, or what the device did: kernel, if, while."""

    name: str
    arguments: str
    result: str


class HostRuntime:
    """The runtime in ``library``; starts from a clean state, which ``reset`` restores.

    Attributes:
        library: The ctypes library, for the functions that a test's own sources export.
    """

    KINDS = ("streams", "events", "graphs", "execs", "device_memory", "host_memory")

    def __init__(self, library: Path, *, seed: int = 0) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in ("log", "failure", "error_name"):
            getattr(self.library, f"cuda_host_{name}").restype = ctypes.c_char_p
        for name in ("set", "inject"):
            getattr(self.library, f"cuda_host_{name}").restype = ctypes.c_bool
        for name in ("live", "switches", "new_stream"):
            getattr(self.library, f"cuda_host_{name}").restype = ctypes.c_int64
        self.reset(seed=seed)

    def call(self, function: str, *arguments: int | float | bytes | torch.Tensor | ctypes.Array[Any]) -> int:
        """Call what ``library`` exports; a tensor stands for its address, an int for any integer or pointer."""
        return getattr(self.library, function)(*map(c_argument, arguments))

    def error_name(self, error: int) -> str:
        return self.library.cuda_host_error_name(error).decode()

    def launch(self, function: str, *arguments: int | float | bytes | torch.Tensor | ctypes.Array[Any]) -> None:
        """The same for a function that returns a cudaError, which is raised as a RuntimeError."""
        error = self.call(function, *arguments)
        if error:
            raise RuntimeError(self.failure or self.error_name(error))

    def reset(self, *, seed: int = 0, **settings: int) -> None:
        """Forget every object, call, error and setting (see CUDA_HOST_SETTINGS), then apply ``settings``."""
        self.library.cuda_host_reset(ctypes.c_uint64(seed))
        self.configure(**settings)

    def configure(self, **settings: int) -> None:
        """Set device_count, sm_count, driver_version, ...: the names in CUDA_HOST_SETTINGS."""
        for name, value in settings.items():
            if not self.library.cuda_host_set(name.encode(), ctypes.c_int64(value)):
                raise ValueError(f"no setting is named {name!r}")

    def set_seed(self, seed: int) -> None:
        """The schedule of launches from here on: 0 ascending, 1 descending, others shuffled."""
        self.library.cuda_host_set_seed(ctypes.c_uint64(seed))

    def inject(self, function: str, error: str, *, nth: int = 1) -> None:
        """Let the ``nth`` call of ``function`` from now on do nothing and return the error named ``error``."""
        if not self.library.cuda_host_inject(function.encode(), ctypes.c_int64(nth), error.encode()):
            raise ValueError(f"no error is named {error!r}")

    @property
    def log(self) -> list[Call]:
        """Every call since the last reset or clear_log."""
        return [Call(*line.split("\t")) for line in self.library.cuda_host_log().decode().splitlines()]

    def clear_log(self) -> None:
        self.library.cuda_host_clear_log()

    def new_stream(self) -> int:
        """A stream that does not wait for the legacy one, as torch's are."""
        return self.library.cuda_host_new_stream()

    @property
    def device(self) -> int:
        """The current device."""
        return self.library.cuda_host_current_device()

    @property
    def kernels(self) -> list[str]:
        """The names of the kernels that ran, in order."""
        return [call.arguments.split(", grid (")[0] for call in self.log if call.name == "kernel"]

    @property
    def failure(self) -> str:
        """What the failed launch did wrong, or an empty string."""
        return self.library.cuda_host_failure().decode()

    @property
    def live(self) -> dict[str, int]:
        """How many objects of each kind exist; kinds without any are left out."""
        counts = {kind: self.library.cuda_host_live(kind.encode()) for kind in self.KINDS}
        return {kind: count for kind, count in counts.items() if count}

    @property
    def switches(self) -> int:
        """How often a thread was resumed, in all."""
        return self.library.cuda_host_switches()


def c_argument(value: int | float | bytes | torch.Tensor | ctypes.Array[Any]) -> object:
    if isinstance(value, int):
        return ctypes.c_int64(value)  # registers are wider than int: the callee takes what it needs
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(value.data_ptr()) if hasattr(value, "data_ptr") else value
