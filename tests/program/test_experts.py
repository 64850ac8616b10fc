"""What route_experts and the ops behind it promise beyond one module's numbers: what is read, ties, neighbours."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from skipkernels import FixedPolicy
from skipkernels.errors import ModelError
from skipkernels.executors.reference import ReferenceExecutor
from skipkernels.model.matrix import float_tensor
from skipkernels.program.reference import route_experts
from skipkernels.program.table import Instruction, instruction
from tests.executors.decoder import Decoder, MakeExecutor, natively, packed
from tests.models import random_prompt, stock_tokens, tiny_engine, tiny_module

FAMILY = "qwen3_moe with dense layers"
PROMPTS = [random_prompt(9, seed) for seed in range(3)]


def router(logits: torch.Tensor, chosen: int, norm: bool = False) -> Instruction:
    """Routes rows of one-hot states, whose logits are therefore ``logits`` [rows, experts]."""
    rows, experts = logits.shape
    return instruction(
        "route_experts",
        row_mask=torch.ones(rows, dtype=torch.int32),
        hidden_states=torch.eye(rows),
        post_attention_layernorm=torch.full((rows,), rows**-0.5),
        router=logits.T.contiguous(),
        router_logits=torch.zeros(rows, experts),
        expert_ids=torch.zeros(rows, chosen, dtype=torch.int32),
        expert_weights=torch.zeros(rows, chosen),
        expert_begins=torch.zeros(experts + 1, dtype=torch.int32),
        expert_pairs=torch.zeros(rows * chosen, dtype=torch.int32),
        experts_read=torch.zeros(1, dtype=torch.int64),
        rms_norm_eps=0.0,
        norm_topk_prob=norm,
        layer=0,
    )


def test_choices_are_torch_s_and_listed_by_expert() -> None:
    logits = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    ins = router(logits, 3)
    route_experts(ins)
    shares, ids = logits.softmax(-1).topk(3)
    t: Any = ins.tensors
    assert t["expert_ids"].tolist() == ids.tolist()
    assert torch.allclose(t["expert_weights"], shares)
    listed = [
        (expert, pair) for expert, (a, b) in enumerate(pairwise(t["expert_begins"])) for pair in t["expert_pairs"][a:b]
    ]
    assert listed == sorted((int(ids[row, c]), 3 * row + c) for row in range(7) for c in range(3))
    assert t["experts_read"] == len(ids.unique())


def test_the_lower_id_of_equals_is_chosen() -> None:
    ins = router(torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0]]), 3, norm=True)
    route_experts(ins)
    assert ins.tensors["expert_ids"].tolist() == [[1, 3, 2]]
    assert ins.tensors["expert_weights"].sum() == pytest.approx(1.0)


@pytest.mark.parametrize("make_executor", [natively, ReferenceExecutor])
def test_only_chosen_experts_are_read(make_executor: MakeExecutor) -> None:
    """The others' matrices are NaN, and nothing changes; experts_read counts each chosen one."""
    logits, chosen = [], []
    for _ in range(2):
        config, weights = packed(tiny_module("qwen3_moe"), max_seq_len=96)
        decoder = Decoder(config, weights, make_executor)
        decoder.begin(0, PROMPTS[0])
        decoder.give_blocks(0)
        decoder.feed(0, PROMPTS[0][:-1])
        last, others = weights.layers[-1], set(range(6)) - set(chosen or range(6))
        for matrix in (last.gate_up_proj, last.down_proj):
            float_tensor(matrix).view(6, -1, matrix.shape[1])[list(others)] = float("nan")
        decoder.state.experts_read.zero_()
        decoder.state.start_decoding(0)
        decoder.step()
        assert decoder.state.experts_read.tolist() == [2] * 4
        logits.append(decoder.state.logits)
        chosen = decoder.state.expert_ids[0].tolist()
    assert torch.equal(*logits)
    assert logits[1].isfinite().all()
    assert len(others) == 4


@pytest.mark.parametrize("family", ["qwen3_moe", FAMILY, "mixtral"])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_bitwise_as_alone(family: str, threads: int) -> None:
    config, weights = packed(tiny_module(family), max_seq_len=96)
    together = Decoder(config, weights, natively, num_sequences=3, num_prompt_rows=24)
    for slot, prompt in enumerate(PROMPTS):
        together.begin(slot, prompt)
        together.give_blocks(slot)
        together.add_prompt_rows(slot, 0, prompt[:-1])
        together.state.start_decoding(slot)
    together.step()
    for slot, prompt in enumerate(PROMPTS):
        alone = Decoder(config, weights, natively, num_prompt_rows=3)
        alone.begin(0, prompt)
        alone.give_blocks(0)
        alone.feed(0, prompt[:-1])
        alone.state.start_decoding(0)
        alone.step()
        assert torch.equal(alone.state.logits[0], together.state.logits[slot])
        assert len(together.state.expert_ids.unique()) > 2


def test_a_skipped_block_reads_no_expert_and_no_router() -> None:
    engine = tiny_engine("qwen3_moe")
    engine.generate([PROMPTS[0]], max_new_tokens=1, eos_token_ids=[])
    of_prompt = engine.state.experts_read.clone()
    engine.state.experts_read.zero_()
    engine.loop.forget_prefixes()
    (answer,) = engine.generate(
        [PROMPTS[0]], max_new_tokens=12, policy=FixedPolicy(layers=(1, 2), warmup_tokens=0), eos_token_ids=[]
    )
    assert answer.skip_map[1:, [1, 2]].all()
    assert not answer.skip_map[:, [0, 3]].any()
    assert answer.token_ids != stock_tokens(tiny_module("qwen3_moe"), PROMPTS[0], 12)
    assert (engine.state.experts_read - of_prompt).tolist() == [22, 0, 0, 22]  # 11 tokens of 2 experts


def test_bytes_are_those_of_the_chosen_experts() -> None:
    engine = tiny_engine("qwen3_moe")
    router_bytes, expert_bytes = 6 * 40 * 4, 3 * 24 * 40 * 4
    assert engine.weights.ffn_nbytes() == router_bytes + 2 * expert_bytes
    assert engine.config.ffn_bytes(torch.float32) == engine.weights.ffn_nbytes()
    assert engine.config.decode_weight_bytes(torch.float32) == engine.weights.decode_nbytes()
    assert engine.config.weight_bytes(torch.float32) == sum(
        matrix.nbytes for _, matrix in engine.weights.tensors() if len(matrix.shape) == 2
    )


def test_what_cannot_be_done_with_experts_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="num_experts_per_tok=7 is more than the 6 experts"):
        tiny_engine(module=tiny_module("qwen3_moe", num_experts_per_tok=7))
