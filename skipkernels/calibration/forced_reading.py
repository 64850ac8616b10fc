"""Reading passages in PyTorch, all positions at once, with a hand on every FFN.

The prompt and the first generated token run in full, as in a decode; a change of the FFNs acts on the positions after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from skipkernels.calibration.passages import Passage
from skipkernels.decoding.prefill import Products, final_logits, prefill

if TYPE_CHECKING:
    from skipkernels.engine import Engine


@dataclass(frozen=True)
class Reading:
    """One passage, dense. Position ``t`` of the decoded ones predicts token ``prompt_tokens + t``."""

    passage: Passage
    log_probs: torch.Tensor  # f32 [decoded, vocab]
    streams: list[torch.Tensor]  # per layer [tokens, hidden], the residual stream after it
    similarities: torch.Tensor  # f32 [decoded, layers], cosine of the stream before and after each FFN


def read_dense(engine: Engine, passage: Passage, products: Products | None = None) -> Reading:
    """``products`` sees the activated gates and the ups of every layer and position; it returns their product."""
    streams, similarities = [], []

    def observe(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        streams.append(after)
        similarities.append(torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).cpu())

    tokens = torch.tensor(passage.token_ids[:-1], dtype=torch.int32)
    with engine.loop.own_rows() as own:
        prefill(engine.config, engine.weights, own.state, 0, tokens, observe=observe, products=products)
    decoded = slice(passage.prompt_tokens - 1, None)
    return Reading(
        passage, _log_probs(engine, streams[-1][decoded]), streams, torch.stack(similarities, dim=1)[decoded]
    )


def divergence(engine: Engine, dense: Reading, layer: int, products: Products) -> torch.Tensor:
    """KL(dense || changed) in nats, f32 [decoded], where ``products`` changes the FFN of ``layer`` alone."""
    last: list[torch.Tensor] = []

    def at_one(index: int, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return products(index, gate, up) if index == layer else gate * up

    def observe(index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        last[:] = [after]

    tokens = torch.tensor(dense.passage.token_ids[:-1], dtype=torch.int32)
    resume = (layer, dense.streams[layer - 1]) if layer else None
    with engine.loop.own_rows() as own:
        prefill(engine.config, engine.weights, own.state, 0, tokens, observe=observe, products=at_one, resume=resume)
    other = _log_probs(engine, last[0][dense.passage.prompt_tokens - 1 :])
    return (dense.log_probs.exp() * (dense.log_probs - other)).sum(-1).cpu()


@torch.inference_mode()
def _log_probs(engine: Engine, hidden: torch.Tensor) -> torch.Tensor:
    return final_logits(engine.config, engine.weights, hidden).float().log_softmax(-1)
