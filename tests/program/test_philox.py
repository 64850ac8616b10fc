"""The counter-based generator against its published known answers."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.program.philox import GATE_STREAM, SAMPLE_STREAM, philox_uniform

WORD = 0xFFFFFFFF


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10, word by word from the paper (Salmon et al., SC 2011)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


# kat_vectors of Random123
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_plain_rendering_gives_the_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    assert philox(counter, key) == words


def test_uniform_numbers_are_the_known_words() -> None:
    words = KNOWN[0][2]
    assert philox_uniform(0, [0, 1, 2, 3], 0, 0).tolist() == [((word >> 8) + 0.5) / 2**24 for word in words]


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    index=st.integers(0, WORD),
    step=st.integers(0, 2**31 - 1),
    stream=st.sampled_from([SAMPLE_STREAM, GATE_STREAM]),
)
def test_uniform_numbers_are_a_function_of_seed_index_step_and_stream(
    seed: int, index: int, step: int, stream: int
) -> None:
    word = philox([index // 4, step, stream, 0], [seed & WORD, seed >> 32 & WORD])[index % 4]
    assert philox_uniform(seed, index, step, stream) == ((word >> 8) + 0.5) / 2**24


def test_numbers_lie_inside_the_unit_interval_and_spread_over_it() -> None:
    numbers = philox_uniform(3, np.arange(4096), 5, SAMPLE_STREAM)
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert np.histogram(numbers, 8, (0, 1))[0].min() > 430  # 512 expected, standard deviation 21
