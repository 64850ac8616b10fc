"""The errors a user can meet. Every message names the expected value, the actual one and what to do next."""

from __future__ import annotations


class SkipkernelsError(Exception):
    """Base of all errors raised on purpose by this package; the CLI prints them on one line, without a traceback."""


class ModelError(SkipkernelsError, ValueError):
    """A checkpoint or module cannot be used: unsupported family, missing tensor, wrong shape, truncated shard."""


class PolicyError(SkipkernelsError, ValueError):
    """A skip policy is impossible or does not belong to this model."""


class RequestError(SkipkernelsError, ValueError):
    """A generation request cannot be served: empty prompt, prompt longer than the cache, batch too large.
    ``param``: the field of a request that it is about, where there is one and whoever raises it knows."""

    def __init__(self, message: str = "", *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTypeError(RequestError, TypeError):
    """What was given as a prompt is none; the message says what is accepted."""


class DeviceError(SkipkernelsError, RuntimeError):
    """A device, executor or instruction set was asked for that is not there."""
