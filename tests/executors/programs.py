"""Random programs over guarded buffers: what an executor must not read is NaN, what it must not write is watched."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from skipkernels.executors import Executor
from skipkernels.executors.reference import ReferenceExecutor
from skipkernels.model.config import ModelConfig
from skipkernels.model.weights import ModelWeights, allocate_weights
from skipkernels.program import Program, build_program
from skipkernels.program.program import Variant
from skipkernels.program.reference import REFERENCE, choose_experts
from skipkernels.program.state import LAYOUTS, DecodeState, Layout
from skipkernels.program.table import OPS, Instruction
from skipkernels.skipping.policy import Policy
from tests.tolerances import assert_close, name_of

GUARD = 64
"""Elements in front of and behind every buffer."""
_SENTINELS = {torch.int32: -77, torch.int64: -77, torch.uint8: 77}  # floats are guarded by NaN


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy with GUARD poisoned elements on either side."""
    around = torch.full((tensor.numel() + 2 * GUARD,), _SENTINELS.get(tensor.dtype, float("nan")), dtype=tensor.dtype)
    inner = around[GUARD:-GUARD].view(tensor.shape)
    inner.copy_(tensor)
    return inner


def assert_guards_hold(tensor: torch.Tensor, what: str) -> None:
    around = tensor.as_strided((tensor.numel() + 2 * GUARD,), (1,), tensor.storage_offset() - GUARD)
    edges = torch.cat((around[:GUARD], around[-GUARD:]))
    sentinel = _SENTINELS.get(tensor.dtype)
    assert (edges.isnan() if sentinel is None else edges == sentinel).all(), f"{what} was written past its end"


@dataclass(frozen=True)
class Case:
    """The sizes and variants of one random program over one step's rows."""

    seq_lens: tuple[int, ...]  # the position of every sequence's decode row
    active: tuple[bool, ...]  # of every decode row
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    head_dim: int
    num_key_value_heads: int
    group_size: int
    dtype: torch.dtype
    policies: tuple[Policy, ...]  # sequence i has the (i modulo their number)-th
    seed: int
    sliding_window: int | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    o_proj_bias: bool = False
    prompt_rows: tuple[int, ...] = ()  # of every sequence: the positions right before its decode row
    idle_rows: int = 1  # prompt rows of no sequence
    activation: str = "silu"
    branch_norms: bool = False
    multiplier: float = 1.0  # of embeddings and of branches
    post_norms_only: bool = False  # and q and k are normed over all their heads together
    rotary_share: float = 1.0  # of a head's channels
    grows_queries: bool = False  # by their position
    softcap: float = 0.0  # of scores and logits
    multi_axis: bool = False  # prompt rows rotate by three positions
    num_layers: int = 4
    neuron_rows: bool = False
    num_experts: int = 0  # in all layers but the second
    expert_biases: bool = False
    sinks: bool = False  # of attention
    layout: Layout = LAYOUTS["cpu"]

    @property
    def num_sequences(self) -> int:
        return len(self.seq_lens)

    @property
    def max_seq_len(self) -> int:
        return max(self.seq_lens) + 2

    def config(self) -> ModelConfig:
        return ModelConfig(
            model_type="llama",
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_key_value_heads * self.group_size,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_seq_len,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            qkv_bias=self.qkv_bias,
            o_proj_bias=self.o_proj_bias,
            qk_norm=self.qk_norm or self.post_norms_only,
            norms_whole_qk=self.post_norms_only,
            input_norms=not self.post_norms_only,
            activation=self.activation,
            branch_norms=self.branch_norms or self.post_norms_only,
            partial_rotary_factor=self.rotary_share,
            query_scale_beta=float(self.grows_queries),
            attention_softcap=self.softcap,
            logits_softcap=self.softcap,
            attention_sinks=self.sinks,
            embed_scale=self.multiplier,
            residual_multiplier=self.multiplier,
            # the first layers slide, the last attends to all
            sliding_windows=(self.sliding_window,) * (self.num_layers - 1) + (None,),
            rope_parameters=self._rope_parameters(),
            **self._experts(),
        )

    def _experts(self) -> dict[str, Any]:
        if not self.num_experts:
            return {}
        return {
            "num_experts": self.num_experts,
            "num_experts_per_tok": min(3, self.num_experts),
            "moe_intermediate_size": max(1, self.intermediate_size // 2),
            "norm_topk_prob": self.seed % 2 == 0,
            "expert_biases": self.expert_biases,
            "expert_layers": tuple(layer != 1 for layer in range(self.num_layers)),
        }

    def _rope_parameters(self) -> tuple[tuple[str, object], ...]:
        if not self.multi_axis:
            return ()
        pairs = self.head_dim // 2
        return (("mrope_section", (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)),)

    def weights(self) -> ModelWeights:
        generator = torch.Generator().manual_seed(self.seed)
        weights = allocate_weights(self.config(), self.dtype, self.max_seq_len, neuron_rows=self.neuron_rows)

        def filled(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            noise = torch.randn(tensor.shape, generator=generator)
            return guarded(noise / tensor.shape[1] ** 0.5 if tensor.dim() == 2 else 1 + 0.3 * noise).to(tensor.dtype)

        for layer in weights.layers:
            for item in fields(layer):
                setattr(layer, item.name, _in_dtype(filled(getattr(layer, item.name))))
            if self.neuron_rows:
                layer.down_proj = guarded(layer.down_proj.T).T
        for name in ("embed_tokens", "norm", "lm_head"):
            setattr(weights, name, _in_dtype(filled(getattr(weights, name))))
        pairs = torch.arange(self.config().rotary_pairs)
        positions = torch.arange(self.max_seq_len)
        angles = positions[:, None] * 100.0 ** (-pairs / max(1, len(pairs)))
        weights.query_scale = guarded(1 + positions / 50) if self.grows_queries else None
        weights.rope_cos, weights.rope_sin = guarded(angles.cos()), guarded(angles.sin())
        return weights

    def state(self) -> DecodeState:
        """Sequences in the middle of a generation, some with the end of their prompt still to be cached. Their blocks
        lie scattered over the pool; every position that no row of the step may read is NaN."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        prompt_rows = self.prompt_rows or (0,) * self.num_sequences
        size = self.layout.block_size
        needed = [-(-(seq_len + 1) // size) for seq_len in self.seq_lens]
        state = DecodeState.allocate(
            self.config(),
            num_sequences=self.num_sequences,
            num_prompt_rows=sum(prompt_rows) + self.idle_rows,
            num_blocks=sum(needed) + 2,
            neurons=self.neuron_rows,
            max_seq_len=self.max_seq_len,
            dtype=self.dtype,
            layout=self.layout,
        )
        for _, tensor in state.buffers():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        state.top_p.fill_(1.0)
        state.no_thresholds.zero_()
        state.branch.zero_()
        state.qkv.zero_()
        blocks = torch.randperm(state.num_blocks, generator=generator).tolist()
        row = 0
        for slot, (seq_len, active, chunk) in enumerate(zip(self.seq_lens, self.active, prompt_rows, strict=True)):

            def draw(low: float, high: float) -> float:
                return float(torch.rand((), generator=generator)) * (high - low) + low

            tokens = torch.randint(self.vocab_size, (seq_len + 1,), generator=generator, dtype=torch.int32)
            state.begin_sequence(slot, tokens, min(seq_len, int(draw(0, 5))))
            state.start_decoding(slot)
            own, blocks = blocks[: needed[slot]], blocks[needed[slot] :]
            state.set_blocks(slot, own)
            state.set_policy(slot, self.policies[slot % len(self.policies)].plan(self.num_layers))
            # every neuron has a threshold of its own, as with a policy's scales
            state.gate_thresholds[slot] *= torch.rand(state.gate_thresholds.shape[1:], generator=generator) * 2 + 0.2
            state.skipped[slot] = int(draw(0, 8))
            state.threshold_scale[slot] = draw(0.1, 10.0)
            state.left_out[slot] = int(draw(0, 12 * self.intermediate_size * self.hidden_size * self.dtype.itemsize))
            state.max_new_tokens[slot] = int(draw(1, 8))
            state.eos_token_ids[slot, 0] = int(draw(0, self.vocab_size))
            cached = torch.arange(seq_len - chunk)
            at = torch.tensor(own)[cached // size], cached % size
            for cache in (state.k_cache, state.v_cache):
                values = torch.randn(len(cached), len(cache), *cache.shape[2::2], generator=generator)
                cache.transpose(0, 1)[at[0], :, :, at[1]] = values.to(cache.dtype)
            self._set_prompt_rows(state, row, slot, seq_len - chunk, tokens[seq_len - chunk : seq_len], generator)
            row += chunk
            state.temperature[slot] = 0.0 if draw(0, 1) < 0.4 else draw(0.3, 2.0)
            state.top_k[slot] = int(draw(-self.vocab_size, self.vocab_size)) if draw(0, 1) < 0.7 else 0
            state.top_k[slot].clamp_(min=0)
            state.top_p[slot] = draw(0.1, 1.0) if draw(0, 1) < 0.5 else 1.0
            state.min_p[slot] = draw(0.0, 0.3) if draw(0, 1) < 0.5 else 0.0
            state.repetition_penalty[slot] = draw(0.5, 2.0) if draw(0, 1) < 0.5 else 1.0
            state.seed[slot] = int(draw(-(2**62), 2**62))
            if not active:
                state.end_sequence(slot)
        for name, tensor in list(state.buffers()):
            setattr(state, name, guarded(tensor))
        return state

    def _set_prompt_rows(
        self, state: DecodeState, row: int, slot: int, start: int, tokens: torch.Tensor, generator: torch.Generator
    ) -> None:
        """Prompt tokens, or tokens computed again with some FFNs left out, or embeddings in place of tokens."""
        chunk = len(tokens)
        if not chunk:
            return
        run_map = torch.randint(2, (chunk, self.num_layers), generator=generator) if slot % 3 == 1 else None
        scale = torch.rand(chunk, generator=generator) if slot % 3 == 1 else None
        embeddings = torch.randn(chunk, self.hidden_size, generator=generator) if slot % 3 == 2 else None
        positions = None
        if self.multi_axis:
            low, high = 1 - self.max_seq_len, self.max_seq_len
            positions = torch.randint(low, high, (3, chunk), generator=generator, dtype=torch.int32)
        state.set_prompt_rows(
            row, slot, start, tokens, run_map=run_map, neuron_scale=scale, embeddings=embeddings, positions=positions
        )

    def program(self, weights: ModelWeights, state: DecodeState) -> Program:
        variant = Variant.for_plans(policy.plan(self.num_layers) for policy in self.policies)
        return build_program(self.config(), weights, state, gated=variant.gated, neurons=variant.neurons)


def _in_dtype(tensor: torch.Tensor | None) -> Any:
    """Guards are lost in a conversion; put them back."""
    return None if tensor is None else guarded(tensor)


def snapshot(state: DecodeState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.buffers()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


ROUNDED_OPS = (
    "qkv_rope_append",
    "decode_attention",
    "o_proj_add",
    "gate_up_act",
    "down_proj_add",
    "route_experts",
    "experts_gate_up_act",
    "experts_down_proj_add",
    "experts_down_proj_neurons_add",
    "gate_proj_act",
    "up_proj_mul",
    "down_proj_neurons_add",
    "lm_head",
)


def compare_instruction(
    ins: Instruction,
    actual: DecodeState,
    expected: DecodeState,
    before: dict[str, torch.Tensor],
    rounds_activations: bool = False,
) -> None:
    """Every output of ``ins`` agrees; rows it does not act on and all other buffers keep their bits.

    ``ins`` is the one recorded over ``actual``; ``before`` is ``actual`` as it was before the instruction. Where the
    executor ``rounds_activations`` to bf16 before it multiplies, its products agree within that.
    """
    rounded = rounds_activations and ins.op in ROUNDED_OPS
    if ins.op == "route_experts" and ins.rows:
        _choose_by(actual.router_logits, ins, expected, before, "bf16 activations" if rounded else "fp32")
    if ins.op == "experts_gate_up_act" and ins.tensors["gate_thresholds"] is not None:
        _leave_out_by(actual.expert_intermediate, ins, expected, 0.3 if rounded else 1e-4)
    written = _written_fields(ins, actual)
    for name, now in actual.buffers():
        what = f"{name} after {ins.op}"
        assert_guards_hold(now, what)
        access = written.get(name)
        if access is None:
            assert same_bits(now, before[name]), f"{ins.op} changed {name}, which is none of its outputs"
        elif access != "scratch":
            reference = getattr(expected, name)
            if ins.op == "skip_gate" and name == "similarity":
                assert_close(now, reference, "square root", what)
            elif name == "router_logits":
                pass  # compared before they chose
            elif name == "neurons":  # behind its number a list is undefined
                listed = int(expected.num_neurons)
                assert same_bits(now[:listed], reference[:listed]), f"{what} differs from the reference"
            elif now.is_floating_point() and ins.op not in ("advance", "embed"):
                assert_close(now, reference, "bf16 activations" if rounded else name_of(now.dtype), what)
            else:
                assert same_bits(now, reference), f"{what} differs from the reference"
    _assert_other_rows_untouched(ins, before, actual, written)


def _choose_by(
    logits: torch.Tensor,
    ins: Instruction,
    expected: DecodeState,
    before: dict[str, torch.Tensor],
    tolerance: str,
) -> None:
    """Logits of the executor agree with the reference's, and so do the choices that they make: a difference within the
    tolerance may choose others."""
    rows = ins.rows
    assert_close(logits[rows], expected.router_logits[rows], tolerance, "router_logits")
    expected.router_logits.copy_(logits)
    expected.experts_read.copy_(before["experts_read"])
    names = [name for name, field in OPS[ins.op].tensors.items() if field.access != "in"]
    choose_experts(replace(ins, tensors={name: getattr(expected, name) for name in names}))


def _leave_out_by(products: torch.Tensor, ins: Instruction, expected: DecodeState, near: float) -> None:
    """Where a gate is so ``near`` its threshold, as a share of it, that rounding decides, the executor may leave a
    neuron out that the reference keeps, or keep one: ``expected`` takes its choice, with the reference's product."""
    most, least = (_products_at(ins, scale) for scale in (1 - near, 1 + near))
    either = (most != 0) & (least == 0)
    expected.expert_intermediate[either] = torch.where(products[either] == 0, 0.0, most[either])


def _products_at(ins: Instruction, scale: float) -> torch.Tensor:
    changed = {name: ins.tensors[name] * scale for name in ("neuron_scale", "expert_intermediate")}
    changed["expert_intermediate"].zero_()
    REFERENCE[ins.op](replace(ins, tensors={**ins.tensors, **changed}))
    return changed["expert_intermediate"]


def compare_program(
    case: Case, executor: Callable[[Program, DecodeState], Executor], rounds_activations: bool = False
) -> None:
    """Runs the case's program in the executor and in the reference and compares after every instruction."""
    weights, state, expected = case.weights(), case.state(), case.state()
    program = case.program(weights, state)
    actual = executor(program, state)
    reference = ReferenceExecutor(case.program(weights, expected), expected)
    for index, ins in enumerate(program):
        before = snapshot(state)
        actual.run_instruction(index)
        reference.run_instruction(index)
        compare_instruction(ins, state, expected, before, rounds_activations)
        for name, buffer in state.buffers():  # the next instruction starts from the same bits again
            buffer.copy_(getattr(expected, name))


def _written_fields(ins: Instruction, state: DecodeState) -> dict[str, str]:
    """State buffers the instruction may write, with their access; a layer's cache is part of the whole one."""
    spans = {name: _span(tensor) for name, tensor in state.buffers()}
    written = {}
    for operand, spec in OPS[ins.op].tensors.items():
        tensor = ins.tensors[operand]
        if tensor is None or spec.access == "in":
            continue
        start, end = _span(tensor)
        (owner,) = (name for name, (first, last) in spans.items() if first <= start and end <= last)
        written[owner] = spec.access
    return written


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


_ROW_AXIS = {"run_ffn": 1, "similarity": 1, "similarity_partials": 1}


def _assert_other_rows_untouched(
    ins: Instruction, before: dict[str, torch.Tensor], state: DecodeState, written: dict[str, str]
) -> None:
    # advance writes the flags it is predicated by
    acted_on = (before["active"] if ins.op == "advance" else ins.row_mask) != 0
    for name in written:
        now, then = getattr(state, name), before[name]
        if name in ("neurons", "num_neurons", "expert_begins", "expert_pairs", "experts_read"):  # of all rows together
            continue
        if name.endswith("_cache"):
            untouched = torch.ones(now.shape[1], now.shape[3], dtype=torch.bool)
            for row in acted_on.nonzero()[:, 0]:
                position = int(before["row_position"][row])
                block = before["block_table"][before["row_sequence"][row], position // state.block_size]
                untouched[block, position % state.block_size] = False
            now, then = (cache.transpose(2, 3)[:, untouched] for cache in (now, then))
        else:
            axis = _ROW_AXIS.get(name, 0)
            rows = now.shape[axis]
            others = torch.ones(rows, dtype=torch.bool)  # an instruction may act on fewer rows than the buffer has,
            common = min(rows, len(acted_on))  # or on more: prompt rows have no logits
            others[:common] = ~acted_on[:common]
            others = others.nonzero()[:, 0]
            now, then = now.index_select(axis, others), then.index_select(axis, others)
        assert same_bits(now, then), f"{ins.op} touched {name} of a row it does not act on"
