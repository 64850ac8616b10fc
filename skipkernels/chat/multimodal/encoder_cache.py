"""EncoderCache: what an encoder made of images and sounds that come again."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

ENCODERS = ("vision_tower", "visual", "audio_tower")
"""Names of the encoders in the modules of the served families."""


class EncoderCache:
    """Wraps the encoders of a module, so that the same pixels or spectrogram are encoded once, whatever text they come
    with. The outputs that were used last are kept, up to ``max_bytes``. What is around the encoders gets copies of the
    outputs, with the same tensors: some families put other ones in their places."""

    def __init__(self, module: nn.Module, max_bytes: int) -> None:
        self.hits = 0
        self.misses = 0
        self.nbytes = 0
        self._max_bytes = max_bytes
        self._outputs: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()  # the last used last
        self._lock = threading.Lock()
        for name, part in module.named_modules():
            if name.rpartition(".")[2] in ENCODERS:
                self._wrap(name, part)

    def _wrap(self, name: str, encoder: nn.Module) -> None:
        encode = encoder.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            key = _hash_of((name, args, kwargs))
            with self._lock:
                if key in self._outputs:
                    self.hits += 1
                    self._outputs.move_to_end(key)
                    return copy.copy(self._outputs[key][0])
                self.misses += 1
            output = encode(*args, **kwargs)
            self._keep(key, output)
            return output

        encoder.forward = forward

    def _keep(self, key: bytes, output: Any) -> None:
        nbytes = sum(tensor.nbytes for tensor in _tensors(output))
        if nbytes > self._max_bytes:
            return
        with self._lock:
            if key in self._outputs:  # another thread was faster
                return
            self._outputs[key] = copy.copy(output), nbytes
            self.nbytes += nbytes
            while self.nbytes > self._max_bytes:
                _, (_, freed) = self._outputs.popitem(last=False)
                self.nbytes -= freed


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _hash_of(value: Any) -> bytes:
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.digest()


def _add(digest: Any, value: Any) -> None:
    """Tensors count by dtype, shape and content, all else by what it prints as."""
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for name, part in sorted(value.items()):
            digest.update(f"{name}=".encode())
            _add(digest, part)
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for part in value:
            _add(digest, part)
    else:
        digest.update(repr(value).encode())
