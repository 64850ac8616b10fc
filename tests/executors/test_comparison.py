"""ComparingExecutor: silent where the executor is right, and it names the instruction where it is not."""

import pytest
import torch

from skipkernels import DensePolicy, Engine, SkipPolicy
from skipkernels.executors.comparison import ComparingExecutor, Difference
from skipkernels.program import reference
from skipkernels.program.table import Instruction
from tests.models import tiny_module

PROMPT = torch.arange(5, 12)
POLICY = SkipPolicy(threshold=0.5, span=1, first_dense_layers=0, last_dense_layers=0, warmup_tokens=1)


def compared(policy, dtype: str = "fp32") -> tuple[list[Difference], list[int]]:
    engine = Engine.from_pretrained(tiny_module(), dtype=dtype)
    comparing = engine.compare_with_reference(policy)
    assert isinstance(comparing, ComparingExecutor)
    (answer,) = engine.generate([PROMPT], max_new_tokens=4, policy=policy)
    return comparing.differences, answer.token_ids


@pytest.mark.parametrize("policy", [DensePolicy(), POLICY], ids=["dense", "skip"])
def test_a_right_executor_differs_by_rounding_only(policy):
    differences, tokens = compared(policy)
    assert {"embed", "lm_head", "sample", "advance"} <= {one.op for one in differences}
    assert max(one.relative for one in differences) < 1e-5
    (alone,) = Engine.from_pretrained(tiny_module(), dtype="fp32").generate([PROMPT], max_new_tokens=4, policy=policy)
    assert tokens == alone.token_ids  # comparing changes nothing


def test_a_wrong_instruction_is_named_and_no_other(monkeypatch: pytest.MonkeyPatch):
    right = reference.REFERENCE["o_proj_add"]

    def wrong(ins: Instruction) -> None:
        right(ins)
        ins.tensors["hidden_states"].mul_(1.5)

    monkeypatch.setitem(reference.REFERENCE, "o_proj_add", wrong)
    differences, _ = compared(DensePolicy())
    assert {(one.op, one.operand) for one in differences if one.relative > 0.01} == {("o_proj_add", "hidden_states")}


def test_nan_in_another_place_and_a_wrong_integer_are_differences(monkeypatch: pytest.MonkeyPatch):
    for op, operand, spoil in (
        ("lm_head", "logits", lambda tensor: tensor[:1].fill_(float("nan"))),
        ("advance", "num_generated", lambda tensor: tensor.add_(1)),
    ):
        right = reference.REFERENCE[op]

        def wrong(ins, right=right, operand=operand, spoil=spoil) -> None:
            right(ins)
            spoil(ins.tensors[operand])

        with monkeypatch.context() as patched:
            patched.setitem(reference.REFERENCE, op, wrong)
            differences, _ = compared(DensePolicy())
        assert (op, operand) in {(one.op, one.operand) for one in differences if one.relative > 0.01}
