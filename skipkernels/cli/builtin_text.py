"""Default calibration text: several kinds that come with every Python."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FACTS = 400
_CHARACTERS = 150_000  # of each kind, so that none outweighs the others
_SEED = 0


def documentation(pause: Callable[[], None] = lambda: None) -> list[str]:
    """Documents of the standard library, none of which the demo model was trained on, in a fixed random order.
    ``pause`` is called often meanwhile: it takes seconds."""
    from skipkernels.demo.corpus import build_corpus

    documents = build_corpus(pause=pause).held_out
    random.Random(_SEED).shuffle(documents)
    return documents


def kinds_of_text() -> dict[str, str]:
    """The language reference (prose), docstrings, and source code, by name."""
    import pydoc_data.topics

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(_SEED).shuffle(sources)
    kinds = {
        "the language reference": pydoc_data.topics.topics.values(),
        "docstrings": documentation(),
        "source code": (path.read_text(encoding="utf-8", errors="replace") for path in sources[:40]),
    }
    return {name: "\n\n".join(documents)[:_CHARACTERS] for name, documents in kinds.items()}


def demo_streams(tokenizer: PreTrainedTokenizerBase) -> list[Sequence[int]]:
    """Token ids of the documentation and of facts with their answers, arranged as in the demo model's training."""
    from skipkernels.demo.batches import fact_tokens, text_stream
    from skipkernels.demo.facts import load_facts

    facts = random.Random(_SEED).sample(load_facts(), _FACTS)
    answered = chain.from_iterable(chain.from_iterable(fact_tokens(tokenizer, fact)) for fact in facts)
    return [text_stream(tokenizer, documentation()).tolist(), list(answered)]
