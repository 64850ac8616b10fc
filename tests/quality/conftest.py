"""A model of ten layers, text to find methods on, and what each method found."""

from collections.abc import Callable

import pytest

from skipkernels.quality.lengths import Lengths
from skipkernels.quality.method import Found
from skipkernels.quality.methods import METHODS
from skipkernels.quality.setup import Setup
from tests.models import byte_tokenizer, random_prompt, tiny_engine, tiny_module

LAYERS = 10
RATIO = 0.3
LENGTHS = Lengths((2, 40, 40))  # 79 of 82 tokens are past the warm-up


@pytest.fixture(scope="package")
def setup() -> Setup:
    module = tiny_module(num_hidden_layers=LAYERS)
    engine = tiny_engine(module=module, max_batch_size=8, tokenizer=byte_tokenizer())
    return Setup(engine, [random_prompt(4000)], prompt_tokens=8, calibration_tokens=640)


@pytest.fixture(scope="package")
def found(setup: Setup) -> Callable[[str], Found]:
    """What a method found for ``RATIO`` and ``LENGTHS``; searched for once."""
    known: dict[str, Found] = {}

    def look_up(name: str) -> Found:
        if name not in known:
            known[name] = METHODS[name].find(setup, RATIO, LENGTHS)
        return known[name]

    return look_up
