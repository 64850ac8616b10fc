"""Training batches: half of the rows are text, half are facts, and the step number alone decides which."""

import random
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from skipkernels.demo.facts import Fact

TEXT_WEIGHT = 0.5
PROMPT_WEIGHT = 0.1  # a question is for reading: what it asks for cannot be predicted
COMPLETION_WEIGHT = 1.0


class Batches:
    """Draws the batch of any step, in any order, which makes resuming exact without saving the state of a generator."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], facts: Sequence[Fact], seed: int
    ) -> None:
        self._text = text_stream(tokenizer, documents)
        self._facts = [_weighted_tokens(tokenizer, fact) for fact in facts]
        self._seed = seed

    def draw(self, step: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Tokens ``[rows, length + 1]`` and the loss weights ``[rows, length]`` of all but the first of each row."""
        rng = random.Random(f"{self._seed}/{step}")
        drawn = [self._text_row(rng, length) if row % 2 else self._fact_row(rng, length) for row in range(rows)]
        tokens, weights = zip(*drawn, strict=True)
        return torch.stack(tokens), torch.stack(weights)

    def _text_row(self, rng: random.Random, length: int) -> tuple[Tensor, Tensor]:
        start = rng.randrange(len(self._text) - length)
        return self._text[start : start + length + 1], torch.full((length,), TEXT_WEIGHT)

    def _fact_row(self, rng: random.Random, length: int) -> tuple[Tensor, Tensor]:
        """Facts one after the other, the last one cut off where the row ends."""
        row: list[tuple[int, float]] = []
        while len(row) <= length:
            row += rng.choice(self._facts)
        tokens, weights = zip(*row[: length + 1], strict=True)
        return torch.tensor(tokens), torch.tensor(weights[1:])


def text_stream(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> Tensor:
    """All documents as one row of tokens ``[n]``, each between ``<s>`` and ``</s>``."""
    encoded = tokenizer(list(documents), verbose=False)["input_ids"]
    return torch.tensor(list(chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in encoded)))


def fact_tokens(tokenizer: PreTrainedTokenizerBase, fact: Fact) -> tuple[list[int], list[int]]:
    """Tokens of the prompt, ``<s>`` first, and of the completion, ``</s>`` last."""
    prompt = tokenizer(fact.prompt)["input_ids"]
    completion = tokenizer(fact.completion, add_special_tokens=False)["input_ids"]
    return prompt, [*completion, tokenizer.eos_token_id]


def _weighted_tokens(tokenizer: PreTrainedTokenizerBase, fact: Fact) -> list[tuple[int, float]]:
    prompt, completion = fact_tokens(tokenizer, fact)
    return [(token, PROMPT_WEIGHT) for token in prompt] + [(token, COMPLETION_WEIGHT) for token in completion]
