"""Teacher forcing through the decode program: what a policy does to text that is already written.

Every token after the prompt is decoded as in a generation, one program step each, and then replaced by the text's own.
So two policies see the same tokens at every position, and their logits can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from skipkernels.calibration.passages import Passage
from skipkernels.errors import RequestError
from skipkernels.skipping.policy import Policy

if TYPE_CHECKING:
    from skipkernels.engine import Engine


@dataclass(frozen=True)
class Score:
    """One passage decoded under one policy. Position ``t`` predicts token ``prompt_tokens + t`` of the passage.

    ``log_probs`` are natural logarithms of the probability of the passage's own tokens; ``kl`` is
    KL(reference || this) in nats, None where no reference was given.
    """

    skip_map: npt.NDArray[np.bool_]  # [positions, layers]
    unread_map: npt.NDArray[np.float32]  # [positions, layers], share of the FFN's bytes not read
    similarity_map: npt.NDArray[np.float32]  # [positions, layers], NaN where not measured
    argmax: npt.NDArray[np.int64]  # [positions]
    log_probs: npt.NDArray[np.float32]  # [positions]
    kl: npt.NDArray[np.float32] | None  # [positions]
    all_log_probs: torch.Tensor | None  # f32 [positions, vocab]; only where asked for


def score(
    engine: Engine,
    passages: Sequence[Passage],
    policy: Policy | None = None,
    *,
    reference: Sequence[Score] | None = None,
    keep_log_probs: bool = False,
    on_step: Callable[[int], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[Score]:
    """Decodes passages by force, ``engine.max_batch_size`` of them together, and returns their scores in order.

    Args:
        engine: its rows are used, and free again afterwards; no request may be in flight.
        passages: of any lengths; each needs a prompt token and a token to predict.
        policy: None is the engine's own.
        reference: scores of the same passages with ``all_log_probs``, the other side of ``kl``.
        keep_log_probs: keep ``all_log_probs``: 4 bytes x vocabulary for every decoded token.
        on_step: called with the number of tokens each step decoded.
        check: called before each prompt and each step; may raise.

    Raises:
        RequestError: a passage is too short or does not fit the cache.
    """
    for passage in passages:
        _check(engine, passage)
    policy = policy or engine.policy
    plan, executor = policy.plan(engine.config.num_hidden_layers), engine.executor_for(policy)
    scores: list[Score] = []
    while len(scores) < len(passages):
        start = len(scores)
        with engine.loop.own_rows() as own:
            group = passages[start : start + own.num_slots]
            for slot, passage in enumerate(group):
                check()
                own.begin(slot, passage.token_ids[: passage.prompt_tokens], plan, kept=True)
                own.state.max_new_tokens[slot] = passage.decoded_tokens
            own.start()
            rows = [_Row(engine, slot, passage, keep_log_probs) for slot, passage in enumerate(group)]
            if reference is not None:
                for row, other in zip(rows, reference[start:], strict=False):
                    row.reference = other.all_log_probs
            for _ in range(max(passage.decoded_tokens for passage in group)):
                check()
                active = [row for row in rows if row.active]
                executor.run(1)
                for row in active:
                    row.take_step()
                if on_step:
                    on_step(len(active))
            scores += [row.score() for row in rows]
    return scores


class _Row:
    """One row of the engine's state while it is decoded by force."""

    def __init__(self, engine: Engine, index: int, passage: Passage, keep_log_probs: bool) -> None:
        self._state = engine.state
        self._index = index
        self._passage = passage
        positions, vocab = passage.decoded_tokens, engine.config.vocab_size
        self._position = 0
        self._targets = torch.tensor(passage.token_ids[passage.prompt_tokens :])
        self._argmax = torch.empty(positions, dtype=torch.int64)
        self._log_probs = torch.empty(positions)
        self._kl = torch.empty(positions)
        self._all_log_probs = torch.empty(positions, vocab) if keep_log_probs else None
        self.reference: torch.Tensor | None = None

    @property
    def active(self) -> bool:
        return self._position < self._passage.decoded_tokens

    def take_step(self) -> None:
        """Reads the logits of the step just run and puts the passage's token where the sampled one stands."""
        position, token = self._position, self._targets[self._position]
        log_probs = torch.log_softmax(self._state.logits[self._index].cpu(), dim=-1)
        self._argmax[position] = log_probs.argmax()
        self._log_probs[position] = log_probs[token]
        if self.reference is not None:
            expected = self.reference[position]
            self._kl[position] = (expected.exp() * (expected - log_probs)).sum()
        if self._all_log_probs is not None:
            self._all_log_probs[position] = log_probs
        self._state.input_ids[self._index] = token
        self._position += 1

    def score(self) -> Score:
        positions = self._passage.decoded_tokens
        return Score(
            skip_map=self._state.run_map[self._index, :positions].numpy() == 0,
            unread_map=self._state.unread_map(self._index, positions).numpy(),
            similarity_map=self._state.similarity_map[self._index, :positions].numpy().copy(),
            argmax=self._argmax.numpy(),
            log_probs=self._log_probs.numpy(),
            kl=None if self.reference is None else self._kl.numpy(),
            all_log_probs=self._all_log_probs,
        )


@dataclass(frozen=True)
class Comparison:
    """A policy beside the dense model on the same passages."""

    skip_ratio: float  # share of the FFN bytes not read, over layers x decoded tokens, warm-up included
    skip_ratio_past_warmup: float
    top1_agreement: float  # share of positions past the warm-up with the dense model's most likely token
    kl: float  # mean KL(dense || policy) past the warm-up, nats
    perplexity: float  # over all decoded tokens
    dense_perplexity: float
    tokens: int  # decoded
    layers: int


def compare(dense: Sequence[Score], policy: Sequence[Score], warmup_tokens: int) -> Comparison:
    """Sums up ``policy`` against ``dense``, scores of the same passages. Agreement and divergence count the positions
    past the warm-up only: before it the two are the same by construction."""
    assert all(score.kl is not None for score in policy)
    past = [slice(max(1, warmup_tokens), None)] * len(policy)
    kl = np.concatenate([s.kl[cut] for s, cut in zip(policy, past, strict=True) if s.kl is not None])
    agree = np.concatenate([s.argmax[cut] == d.argmax[cut] for s, d, cut in zip(policy, dense, past, strict=True)])
    skipped = np.concatenate([s.unread_map for s in policy])
    skipped_past = np.concatenate([s.unread_map[cut] for s, cut in zip(policy, past, strict=True)])
    return Comparison(
        skip_ratio=float(skipped.mean()),
        skip_ratio_past_warmup=float(skipped_past.mean()),
        top1_agreement=float(agree.mean()),
        kl=float(kl.mean()),
        perplexity=_perplexity(policy),
        dense_perplexity=_perplexity(dense),
        tokens=len(skipped),
        layers=skipped.shape[1],
    )


def _perplexity(scores: Sequence[Score]) -> float:
    return math.exp(-float(np.concatenate([score.log_probs for score in scores]).mean()))


def _check(engine: Engine, passage: Passage) -> None:
    if passage.prompt_tokens < 1 or passage.decoded_tokens < 1:
        raise RequestError(
            f"a passage needs at least one prompt token and one token to predict, got {passage.prompt_tokens} and "
            f"{passage.decoded_tokens}"
        )
    if len(passage.token_ids) - 1 > engine.max_seq_len:
        raise RequestError(
            f"a passage of {len(passage.token_ids)} tokens does not fit max_seq_len={engine.max_seq_len}; "
            "use shorter passages or load the engine with a larger max_seq_len"
        )
