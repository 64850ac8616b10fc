"""Reading passages in PyTorch, all positions at once, with a hand on every FFN.

The prompt and the first generated token run in full, as in a decode; a change of the FFNs acts on the positions after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from skipkernels import _C
from skipkernels.calibration.passages import Passage
from skipkernels.decoding.prefill import Products, final_logits, prefill
from skipkernels.model.weights import ModelWeights
from skipkernels.support.memory import free_memory_bytes

if TYPE_CHECKING:
    from skipkernels.engine import Engine

_LOGITS_AT_ONCE = 16  # positions: a few milliseconds


class Others(Protocol):
    """Who else uses the engine. A reading makes room for them within a layer, and goes on from there."""

    @property
    def wanted(self) -> bool:
        """Whether somebody wants the engine now."""
        ...

    def wait(self) -> None:
        """Returns once nobody does."""


class _Nobody:
    wanted = False

    def wait(self) -> None:
        pass


NOBODY: Others = _Nobody()


class _Wanted(Exception):
    """Somebody else wants the engine."""


@dataclass(frozen=True)
class Reading:
    """One passage, dense. Position ``t`` of the decoded ones predicts token ``prompt_tokens + t``."""

    passage: Passage
    weights: ModelWeights  # that it was read with
    log_probs: torch.Tensor  # f32 [decoded, vocab]
    streams: list[torch.Tensor]  # per layer [tokens, hidden], the residual stream after it
    similarities: torch.Tensor  # f32 [decoded, layers], cosine of the stream before and after each FFN


def for_torch(weights: ModelWeights, pause: Callable[[], None] = NOBODY.wait) -> ModelWeights:
    """Weights whose matrices torch multiplies well as they are. Quantised ones are dequantised, so that a text is read
    with the values they hold; and on a processor without products of bf16 all become fp32, in which torch is three
    times as fast. Where that takes more than half of the free memory, they stay as they are, and quantised ones are
    dequantised again for each product. ``pause`` is called before each matrix."""
    device = str(weights.embed_tokens.device)
    native = device != "cpu" or (weights.dtype == torch.bfloat16 and "avx512_bf16" in _C.usable_isas())
    dtype = weights.dtype if native else torch.float32
    matrices = [matrix for _, matrix in weights.tensors() if len(matrix.shape) == 2]
    foreign = [matrix for matrix in matrices if not isinstance(matrix, torch.Tensor) or matrix.dtype != dtype]
    needed = sum(matrix.shape[0] * matrix.shape[1] for matrix in foreign) * dtype.itemsize
    if not foreign or needed > free_memory_bytes(device) / 2:
        return weights
    return weights.dequantized(dtype, pause)


def read_dense(
    engine: Engine,
    passage: Passage,
    products: Products | None = None,
    weights: ModelWeights | None = None,
    others: Others = NOBODY,
) -> Reading:
    """``products`` sees the activated gates and the ups of every layer and position; it returns their product.
    ``weights``: ``for_torch`` of the engine's; None makes them."""
    weights = for_torch(engine.weights) if weights is None else weights
    streams: list[torch.Tensor] = []
    similarities = []

    def observe(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        streams.append(after)
        similarities.append(torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).cpu())
        _make_room(others)

    tokens = torch.tensor(passage.token_ids[:-1], dtype=torch.int32)
    while len(streams) < engine.config.num_hidden_layers:
        resume = (len(streams), streams[-1]) if streams else None
        with contextlib.suppress(_Wanted), engine.loop.own_rows() as own:
            prefill(engine.config, weights, own.state, 0, tokens, observe=observe, products=products, resume=resume)
    decoded = slice(passage.prompt_tokens - 1, None)
    return Reading(
        passage,
        weights,
        _log_probs(engine, weights, streams[-1][decoded], others),
        streams,
        torch.stack(similarities, dim=1)[decoded],
    )


def divergence(engine: Engine, dense: Reading, layer: int, products: Products, others: Others = NOBODY) -> torch.Tensor:
    """KL(dense || changed) in nats, f32 [decoded], where ``products`` changes the FFN of ``layer`` alone."""

    def at_one(index: int, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return products(index, gate, up) if index == layer else gate * up

    return _divergence(engine, dense, layer, others, products=at_one)


def divergence_without(engine: Engine, dense: Reading, layer: int, others: Others = NOBODY) -> torch.Tensor:
    """The same where the FFN of ``layer`` is left out past the prompt, its experts too."""
    tokens = torch.tensor(dense.passage.token_ids[:-1], dtype=torch.int32)
    run_map = torch.ones(len(tokens), engine.config.num_hidden_layers, dtype=torch.uint8)
    run_map[dense.passage.prompt_tokens :, layer] = 0
    return _divergence(engine, dense, layer, others, run_map=run_map)


def _divergence(engine: Engine, dense: Reading, layer: int, others: Others, **changes: Any) -> torch.Tensor:
    resume = (layer, dense.streams[layer - 1]) if layer else None
    read = layer

    def observe(index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        nonlocal read, resume
        read, resume = index + 1, (index + 1, after)
        _make_room(others)

    tokens = torch.tensor(dense.passage.token_ids[:-1], dtype=torch.int32)
    while read < engine.config.num_hidden_layers:
        with contextlib.suppress(_Wanted), engine.loop.own_rows() as own:
            prefill(engine.config, dense.weights, own.state, 0, tokens, observe=observe, resume=resume, **changes)
    assert resume is not None, "a model has layers"
    other = _log_probs(engine, dense.weights, resume[1][dense.passage.prompt_tokens - 1 :], others)
    return (dense.log_probs.exp() * (dense.log_probs - other)).sum(-1).cpu()


def _make_room(others: Others) -> None:
    if others.wanted:
        raise _Wanted


@torch.inference_mode()
def _log_probs(engine: Engine, weights: ModelWeights, hidden: torch.Tensor, others: Others) -> torch.Tensor:
    parts = []
    for rows in hidden.split(_LOGITS_AT_ONCE):
        others.wait()
        parts.append(final_logits(engine.config, weights, rows).float().log_softmax(-1))
    return torch.cat(parts)
