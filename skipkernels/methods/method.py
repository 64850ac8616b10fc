"""Method: one way to leave out work, at one ratio, with the two things that every task is made of.

Full model, skipped FFNs and skipped layers all stand behind this interface, so every task runs on every method.
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
"""The method that leaves nothing out."""
OnItem = Callable[[int], None]
"""Called with the number of prompts or passages that were finished."""
Progress = Callable[[str, float], None]
"""Called as (what is being done, share that is done)."""
RatioOf = Literal["nothing", "FFN executions", "layers"]
"""What a method's ratio is a share of."""
Found = dict[str, Any]
"""What a method needs to know at a ratio, found on the calibration text; plain JSON."""


def ignore(*_: object) -> None:
    """For those who do not watch."""


@dataclass(frozen=True)
class Answer:
    """A greedy continuation of one prompt. ``text`` ends before a stop string; the ids and ``work`` do not."""

    token_ids: list[int]
    text: str
    work: Work


@dataclass(frozen=True)
class Reading:
    """One passage decoded by force. Position ``t`` predicts token ``prompt_tokens + t`` of the passage.

    ``log_probs`` are natural logarithms of the probability of the passage's own tokens; ``kl`` is
    KL(reference || this) in nats, None where no reference was given.
    """

    argmax: npt.NDArray[np.int64]  # [positions]
    log_probs: npt.NDArray[np.float32]  # [positions]
    kl: npt.NDArray[np.float32] | None  # [positions]
    all_log_probs: torch.Tensor | None  # f32 [positions, vocab]; only where asked for
    work: Work


class Method(Protocol):
    """A model that leaves out some work. Both capabilities decode with the method active.

    A prompt's last position yields the first generated token, so it is part of the prompt: methods that leave prompts
    alone begin to skip with the second token at the earliest.
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
        """Decodes passages by force, in order.

        Args:
            reference: readings of the same passages with ``all_log_probs``, the other side of ``kl``.
            keep_log_probs: keep ``all_log_probs``: 4 bytes x vocabulary for every decoded token.

        Raises:
            RequestError: a passage is too short or does not fit the cache.
        """
        ...


class MethodKind(Protocol):
    """How a method is found for a ratio, and built from what was found."""

    name: ClassVar[str]
    source: ClassVar[str]
    """The paper, and what is done differently here."""
    ratio_of: ClassVar[RatioOf]

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        """What leaves out ``ratio`` of the passages ``alike`` when they are decoded by force.

        What else there is to choose is chosen on the text of the setup; ``alike`` resembles what will be measured, and
        only sets the ratio.

        Raises:
            PolicyError: the ratio cannot be reached; the message says what can.
        """
        ...

    def build(self, setup: Setup, found: Found) -> Method: ...
