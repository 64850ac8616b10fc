import pytest

from skipkernels.decoding.sequence import Sequence, Status
from skipkernels.errors import RequestError


def test_keys_grow_with_the_tokens_and_cover_full_blocks_only() -> None:
    sequence = Sequence(range(5))
    first = list(sequence.block_keys(4))
    assert [key.tokens for key in first] == [(0, 1, 2, 3)]
    sequence.tokens += [5, 6, 7]
    assert [key.tokens for key in sequence.block_keys(4)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert sequence.block_keys(4)[:1] == first
    assert sequence.block_keys(4) == Sequence(range(8)).block_keys(4)


def test_only_blocks_with_a_generated_position_are_the_policys_own() -> None:
    sequence = Sequence(range(5), policy_identity="skip")
    sequence.tokens += [5, 6, 7, 8]
    prompt, mixed = sequence.block_keys(4)
    dense_prompt, dense_mixed = Sequence(range(9)).block_keys(4)
    assert prompt == dense_prompt
    assert mixed != dense_mixed


def test_where_generation_began_is_part_of_what_a_policy_has_written() -> None:
    early, late = Sequence(range(4), policy_identity="skip"), Sequence(range(5), policy_identity="skip")
    early.tokens += [4, 5, 6, 7]
    late.tokens += [5, 6, 7]
    assert early.tokens == late.tokens
    assert early.block_keys(4)[0] == late.block_keys(4)[0]
    assert early.block_keys(4)[1] != late.block_keys(4)[1]


def test_embedded_prompts_have_no_keys() -> None:
    assert Sequence(range(8), embedded=object()).block_keys(4) == []


def test_counts() -> None:
    sequence = Sequence([1, 2, 3])
    sequence.num_cached = 1
    sequence.tokens.append(4)
    assert (sequence.num_tokens, sequence.generated, sequence.num_generated) == (4, [4], 1)
    assert sequence.num_prompt_rows == 2


@pytest.mark.parametrize(("prompt", "new", "message"), [([], None, "no tokens"), ([1], 0, "at least 1, got 0")])
def test_bad_requests(prompt: list[int], new: int | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Sequence(prompt, max_new_tokens=new)


def test_statuses_that_are_final() -> None:
    assert [status.value for status in Status if status.ended] == ["finished", "cancelled"]
