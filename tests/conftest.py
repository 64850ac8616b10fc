"""What every test runs under."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from tests.models import byte_tokenizer

settings.register_profile(
    "skipkernels",
    max_examples=25,
    deadline=None,  # other work shares the processor
    derandomize=True,  # the same examples everywhere; the slow sweeps look further
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("skipkernels")
transformers_logging.disable_progress_bar()
torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it brings


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """One token for each byte, then <s>, </s>."""
    return byte_tokenizer()
