"""A model of ten layers, text to find methods on, and what each method found."""

from collections.abc import Callable

import pytest

from skipkernels.calibration.passages import Passage
from skipkernels.methods.method import Found
from skipkernels.methods.methods import METHODS
from skipkernels.methods.setup import Setup
from tests.models import byte_tokenizer, random_prompt, tiny_engine, tiny_module

LAYERS = 10
RATIO = 0.3
ALIKE = [Passage(tuple(random_prompt(8 + count, seed=100 + count)), 8) for count in (3, 17, 40, 39, 41)]
PAST_WARMUP = 1 - 5 / 140  # five of their 140 tokens come out of the prompt


@pytest.fixture(scope="package")
def setup() -> Setup:
    module = tiny_module(num_hidden_layers=LAYERS)
    engine = tiny_engine(module=module, max_batch_size=8, tokenizer=byte_tokenizer(), neuron_rows=True)
    return Setup(engine, [random_prompt(4000)], prompt_tokens=8, new_tokens=40, passages=8)


@pytest.fixture(scope="package")
def found(setup: Setup) -> Callable[[str], Found]:
    """What a method found for ``RATIO`` on ``ALIKE``; searched for once."""
    known: dict[str, Found] = {}

    def look_up(name: str) -> Found:
        if name not in known:
            known[name] = METHODS[name].find(setup, RATIO, ALIKE)
        return known[name]

    return look_up
