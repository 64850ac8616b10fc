"""Default calibration text: documentation that comes with every Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FACTS = 400
_SEED = 0


def documentation() -> list[str]:
    """Documents of the standard library, none of which the demo model was trained on, in a fixed random order."""
    from skipkernels.demo.corpus import build_corpus

    documents = build_corpus().held_out
    random.Random(_SEED).shuffle(documents)
    return documents


def demo_streams(tokenizer: PreTrainedTokenizerBase) -> list[Sequence[int]]:
    """Token ids of the documentation and of facts with their answers, arranged as in the demo model's training."""
    from skipkernels.demo.batches import fact_tokens, text_stream
    from skipkernels.demo.facts import load_facts

    facts = random.Random(_SEED).sample(load_facts(), _FACTS)
    answered = chain.from_iterable(chain.from_iterable(fact_tokens(tokenizer, fact)) for fact in facts)
    return [text_stream(tokenizer, documentation()).tolist(), list(answered)]
