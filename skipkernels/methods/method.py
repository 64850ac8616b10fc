"""Method: one way to skip work, at one ratio. Every task is built on its two operations, generate and score.

The full model, skipped FFNs and skipped layers implement the same interface, so every task runs on every method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from skipkernels.calibration.passages import Passage
from skipkernels.methods.work import Work

if TYPE_CHECKING:
    from skipkernels.methods.setup import Setup

FULL = "full"
"""The method that skips nothing."""
OnItem = Callable[[int], None]
"""Called with the number of prompts or passages that were finished."""
Progress = Callable[[str, float], None]
"""Called as (what is being done, share that is done)."""
RatioOf = Literal["nothing", "FFN bytes", "layers"]
"""What a method's ratio is a share of."""
Found = dict[str, Any]
"""Parameters of a method at a ratio, found on the calibration text; plain JSON."""


def ignore(*_: object) -> None:
    """A callback that does nothing."""


@dataclass(frozen=True)
class Answer:
    """A greedy continuation of one prompt. ``text`` ends before a stop string; the ids and ``work`` do not."""

    token_ids: list[int]
    text: str
    work: Work


@dataclass(frozen=True)
class Reading:
    """A passage decoded with teacher forcing. Position ``t`` predicts token ``prompt_tokens + t``.

    ``log_probs`` are natural logarithms of the probability of the passage's own tokens; ``kl`` is
    KL(reference || this) in nats, None where no reference was given.
    """

    argmax: npt.NDArray[np.int64]  # [positions]
    log_probs: npt.NDArray[np.float32]  # [positions]
    kl: npt.NDArray[np.float32] | None  # [positions]
    all_log_probs: torch.Tensor | None  # f32 [positions, vocab]; only on request
    work: Work


class Method(Protocol):
    """A model that skips some work. Both operations decode with the method active.

    The first generated token is computed at the prompt's last position: methods that do not skip in prompts begin to
    skip with the second token at the earliest.
    """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        eos_token_ids: Sequence[int] | None = None,
        on_item: OnItem = ignore,
    ) -> list[Answer]:
        """Continues prompts (token ids) greedily, in order.

        Args:
            max_new_tokens: for each prompt.
            stop: strings that end a continuation.
            eos_token_ids: tokens that end a continuation; None: the model's own.

        Raises:
            RequestError: a prompt does not fit the cache.
        """
        ...

    def score(
        self,
        passages: Sequence[Passage],
        *,
        reference: Sequence[Reading] | None = None,
        keep_log_probs: bool = False,
        on_item: OnItem = ignore,
    ) -> list[Reading]:
        """Decodes passages with teacher forcing, in order.

        Args:
            reference: readings of the same passages with ``all_log_probs``, to compute ``kl`` against.
            keep_log_probs: keep ``all_log_probs``: 4 bytes x vocabulary per decoded token.

        Raises:
            RequestError: a passage is too short or does not fit the cache.
        """
        ...


class MethodKind(Protocol):
    """Finds the parameters of a method for a ratio, and builds the method."""

    source: ClassVar[str]
    """The paper, and differences to it."""
    ratio_of: ClassVar[RatioOf]

    @property
    def name(self) -> str: ...

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        """The parameters with which the method skips ``ratio`` on the passages ``alike``, with teacher forcing.

        ``alike`` resembles what will be measured, and only sets the ratio. Everything else is chosen on the text of the
        setup.

        Raises:
            PolicyError: the ratio cannot be reached; the message says what can.
        """
        ...

    def build(self, setup: Setup, found: Found) -> Method: ...
