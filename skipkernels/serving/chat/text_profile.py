"""Profiles of text models without labelled samples: how faithful each strategy is to the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from skipkernels.passages import cut_passages
from skipkernels.serving.chat.text_format import PROFILED_NEW_TOKENS, TextPrompt
from skipkernels.serving.chat.text_model import TextModel
from skipkernels.serving.errors import ProfileError
from skipkernels.serving.profile import Profile
from skipkernels.serving.profiler import Progress, Sample, measure_profile
from skipkernels.serving.strategy import Strategy

_PROMPT_TOKENS = 32
_DENSE = Strategy(("text",))


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    samples: int
    rounds: int
    memory: bool


QUICK = Effort(samples=48, rounds=3, memory=False)
"""To begin with: times are corrected by the batches that follow, promises stay as cautious as few samples make them."""
THOROUGH = Effort(samples=400, rounds=20, memory=True)
"""To keep in a file."""


def measure_text_profile(
    model: TextModel,
    texts: Sequence[str],
    effort: Effort,
    *,
    journal: str | Path | None = None,
    progress: Progress = lambda stage, share: None,
) -> Profile:
    """A profile whose accuracy is fidelity: the share of an answer, up to the first difference, that is the dense
    model's, over continuations of passages of ``texts``.

    Args:
        journal, progress: see ``measure_profile``.

    Raises:
        ProfileError: the model has no dense strategy to compare with.
        RequestError: the texts are too short.
    """
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= model.engine.max_batch_size]
    return measure_profile(
        model,
        dense_continuations(model, texts, effort.samples),
        batch_sizes=sizes,
        rounds=effort.rounds,
        memory=effort.memory,
        journal=journal,
        progress=progress,
    )


def dense_continuations(model: TextModel, texts: Sequence[str], count: int) -> list[Sample]:
    """Passages of ``texts``, at most ``count``, and how the dense model continues them at a cost of 1."""
    if _DENSE not in model.strategies:
        raise ProfileError(
            f"fidelity is measured against the dense model, which is not among {model.name}'s strategies"
        )
    new_tokens = max(1, round(PROFILED_NEW_TOKENS - model.prefill_share * _PROMPT_TOKENS))
    search, held_out = cut_passages(model.engine, texts, count, _PROMPT_TOKENS, 1)
    prompts = [TextPrompt(passage.token_ids[:_PROMPT_TOKENS], new_tokens) for passage in search + held_out]
    step = model.engine.max_batch_size
    answers = [
        answer
        for first in range(0, len(prompts), step)
        for answer in model.run([{"text": prompt} for prompt in prompts[first : first + step]], _DENSE)
    ]
    return [Sample({"text": prompt}, answer.text) for prompt, answer in zip(prompts, answers, strict=True)]
