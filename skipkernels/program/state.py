"""DecodeState: every buffer of a decode, allocated once, with its shape."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from skipkernels.model.config import ModelConfig
from skipkernels.skipping.neuron_rule import NeuronPlan
from skipkernels.skipping.policy import BATCH_RULES, GATE_MODES, GatePlan

MAX_EOS = 16
"""End-of-sequence tokens one sequence may have."""
MAX_TOP_LOGPROBS = 20
"""Likeliest tokens that can be told for each generated one, as many as OpenAI's."""
ADJUSTS_BIAS, ADJUSTS_COUNTS, ADJUSTS_MASK = 1, 2, 4
"""Bits of ``adjusts``: what changes a sequence's logits before its token is chosen."""
_MOST_SEEN = 255  # of a u8
ENDED, DECODING, WAITS_FOR_BLOCK = range(3)
"""What ``progress`` says of a sequence."""


def untouched_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that on a CPU take memory only where they are used; those of ``torch.zeros`` are written at once."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not nbytes:
        return torch.zeros(*shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(*shape)


def counted(seen: int) -> int:
    """What ``seen`` holds of a token after it was generated once more."""
    return min((seen | 1) + 2, _MOST_SEEN)


@dataclass(frozen=True)
class Layout:
    """How kernels cut their work, where the cut shows in a buffer's shape."""

    kv_split_size: int  # positions of one attention split
    rows_per_partial: int  # channels summed into one similarity partial: the row panel of the matrix kernels
    block_size: int = 32  # positions of one cache block


LAYOUTS = {"cpu": Layout(kv_split_size=256, rows_per_partial=24), "cuda": Layout(kv_split_size=64, rows_per_partial=16)}
"""The layout the kernels of a device type want."""


@dataclass
class DecodeState:
    """The buffers of a step's rows, of up to ``num_sequences`` sequences, and of their paged KV cache.

    A row is one token of one sequence. Row i < ``num_sequences`` is the decode row of sequence i: its newest token,
    which is the last of ``token_ids`` so far and stands at ``row_position``. The other rows are prompt rows. Rows whose
    ``active`` flag is zero are left alone by every instruction.

    Position p of sequence s is cached in block ``block_table[s, p // block_size]`` (PagedAttention, Kwon et al., SOSP
    2023, arXiv 2309.06180).

    Buffers marked *host* lie in the host's memory, pinned where the others are on a GPU: a step writes its results
    there, and they can be read while the device runs on.
    """

    layout: Layout

    # per row
    input_ids: torch.Tensor  # i32 [rows]; -1: the row's embedding stands in prompt_embeddings
    row_sequence: torch.Tensor  # i32 [rows]
    row_position: torch.Tensor  # i32 [rows], also the number of cached positions before the row's
    active: torch.Tensor  # i32 [rows]
    run_ffn: torch.Tensor  # i32 [layers, rows], non-zero executes
    neuron_scale: torch.Tensor  # f32 [rows], factor on the sequence's thresholds for neurons; 0 keeps all
    # per prompt row
    prompt_embeddings: torch.Tensor  # f32 [prompt_rows, hidden]
    prompt_positions: torch.Tensor  # i32 [prompt_rows, 3], for models that rotate by three axes
    # per sequence
    next_token: torch.Tensor  # i32 [sequences]
    token_ids: torch.Tensor  # host, i32 [sequences, max_seq_len + 1], prompt and generated
    seen: torch.Tensor  # u8 [sequences, vocab]: 1 where the token stands in token_ids, and 2 for each time generated
    num_generated: torch.Tensor  # i32 [sequences], new tokens so far
    progress: torch.Tensor  # host, i32 [sequences, 2]: num_generated, and ENDED, DECODING or WAITS_FOR_BLOCK
    block_table: torch.Tensor  # i32 [sequences, ceil(max_seq_len / block_size)], -1 where there is no block
    # sampling, per sequence
    temperature: torch.Tensor  # f32 [sequences], 0 is greedy
    top_k: torch.Tensor  # i32 [sequences]
    top_p: torch.Tensor  # f32 [sequences]
    min_p: torch.Tensor  # f32 [sequences]
    repetition_penalty: torch.Tensor  # f32 [sequences]
    adjusts: torch.Tensor  # i32 [sequences]: ADJUSTS_BIAS, ADJUSTS_COUNTS, ADJUSTS_MASK
    logit_bias: torch.Tensor  # f32 [sequences, vocab]
    frequency_penalty: torch.Tensor  # f32 [sequences]
    presence_penalty: torch.Tensor  # f32 [sequences]
    token_mask: torch.Tensor  # i32 [sequences, ceil(vocab / 32)], a bit for each token that is allowed
    seed: torch.Tensor  # i64 [sequences]
    num_logprobs: torch.Tensor  # i32 [sequences]: 0 none, else 1 for the token's own and 1 for each of the likeliest
    logprobs: torch.Tensor  # host, f32 [sequences, max_seq_len, 1 + MAX_TOP_LOGPROBS], of every generated token
    top_tokens: torch.Tensor  # host, i32 [sequences, max_seq_len, MAX_TOP_LOGPROBS]
    max_new_tokens: torch.Tensor  # i32 [sequences]
    eos_token_ids: torch.Tensor  # i32 [sequences, MAX_EOS], -1 pads
    # the skip policy of each sequence
    gate_mode: torch.Tensor  # i32 [sequences]: 0 dense, then 1 + the index in GATE_MODES
    gated: torch.Tensor  # i32 [layers, sequences], non-zero where the layer's FFN may be skipped
    first_gated: torch.Tensor  # i32 [sequences], the first such layer
    gate_threshold: torch.Tensor  # f32 [layers, sequences], for the similarity across the layer's FFN
    gate_span: torch.Tensor  # i32 [sequences], FFNs one trigger skips
    warmup_tokens: torch.Tensor  # i32 [sequences]
    batch_rule: torch.Tensor  # i32 [sequences], index in BATCH_RULES
    gate_probability: torch.Tensor  # f32 [sequences]
    gate_seed: torch.Tensor  # i64 [sequences]
    target_ratio: torch.Tensor  # f32 [sequences], 0: not held
    ramp_tokens: torch.Tensor  # i32 [sequences]
    gate_thresholds: torch.Tensor  # f32 [sequences, layers, intermediate], or with experts [sequences, layers, 1], for
    # |act(gate)|; 0 keeps all
    product_thresholds: torch.Tensor  # f32 [sequences, layers], for |act(gate) up|
    neuron_target_ratio: torch.Tensor  # f32 [sequences], 0: not held
    # skipping, per sequence
    skip_remaining: torch.Tensor  # i32 [sequences], FFNs the last trigger still skips
    skipped: torch.Tensor  # i32 [sequences], FFNs skipped so far
    threshold_scale: (
        torch.Tensor
    )  # f32 [sequences], what the ratio controller has made of 1 - threshold, or of neurons'
    left_out: torch.Tensor  # i64 [sequences], bytes of up_proj and down_proj left out so far in FFNs that ran
    similarity: torch.Tensor  # f32 [layers, sequences], NaN where not measured in this step
    similarity_partials: torch.Tensor  # f32 [partials, sequences, 3]: <h, h'>, |h|^2, |h'|^2
    run_map: torch.Tensor  # host, u8 [sequences, max_seq_len, layers], run_ffn of every generated token
    similarity_map: torch.Tensor  # host, f32 [sequences, max_seq_len, layers]
    scale_map: torch.Tensor  # host, f32 [sequences, max_seq_len], neuron_scale of every generated token
    kept_map: torch.Tensor  # host, i32 [sequences, max_seq_len, layers, 2], neurons read of up_proj and of down_proj
    neuron_shares: (
        torch.Tensor
    )  # host, f32 [layers, 2], of an FFN's bytes, that all neurons of up_proj and down_proj take
    neuron_counts: torch.Tensor  # host, i32 [layers], neurons of a token's FFN
    no_thresholds: torch.Tensor  # f32 [sequences, layers, 1], zeros: select_neurons only counts
    # activations
    hidden_states: torch.Tensor  # f32 [rows, hidden], the residual stream
    qkv: torch.Tensor  # f32 [rows, qkv_size], or without a column where no op uses it; zero between two steps
    branch: torch.Tensor  # f32 [rows, hidden], what goes to hidden_states by branch_add; zero between two steps
    query: torch.Tensor  # f32 [rows, heads, head_dim]
    attn_partials: torch.Tensor  # f32 [rows, heads, splits, head_dim + 2]: max, sum, output
    attn_output: torch.Tensor  # f32 [rows, heads, head_dim]
    intermediate: torch.Tensor  # f32 [rows, intermediate]
    neurons: torch.Tensor  # i32 [the most of neuron_counts], those that some row keeps
    num_neurons: torch.Tensor  # i32 [1], their number
    # of layers with experts; empty where there are none
    router_logits: torch.Tensor  # f32 [rows, experts]
    expert_ids: torch.Tensor  # i32 [rows, experts_per_token]
    expert_weights: torch.Tensor  # f32 [rows, experts_per_token]
    expert_begins: torch.Tensor  # i32 [experts + 1]
    expert_pairs: torch.Tensor  # i32 [rows * experts_per_token], choices in the order of their experts
    expert_intermediate: torch.Tensor  # f32 [rows, experts_per_token, moe_intermediate]
    experts_read: torch.Tensor  # i64 [layers], experts whose matrices were read, over all steps
    logits: torch.Tensor  # f32 [sequences, vocab]
    # the cache, in the weights' dtype
    k_cache: torch.Tensor  # [layers, blocks, kv_heads, block_size, head_dim]
    v_cache: torch.Tensor  # [layers, blocks, kv_heads, block_size, head_dim]

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        *,
        num_sequences: int,
        max_seq_len: int,
        dtype: torch.dtype,
        num_prompt_rows: int = 0,
        num_blocks: int | None = None,
        neurons: bool = False,
        device: torch.device | str = "cpu",
        layout: Layout | None = None,
    ) -> DecodeState:
        """Allocates all buffers; every row starts inactive and no sequence has a block.

        Args:
            neurons: policies may leave out neurons. A threshold for each of a sequence takes 1.8 MB in an 8B model; a
                state without them has none.
            num_blocks: None: enough for every sequence at max_seq_len.
            layout: None is the device's own.
        """
        device = torch.device(device)
        layout = layout or LAYOUTS[device.type]
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        partials = -(-config.hidden_size // layout.rows_per_partial)
        splits = -(-max_seq_len // layout.kv_split_size) + 1  # a sliding window may straddle one more than it fills
        table = -(-max_seq_len // layout.block_size)
        blocks = num_sequences * table if num_blocks is None else num_blocks
        cache = (layers, blocks, config.num_key_value_heads, layout.block_size, config.head_dim)
        rows, sequences = num_sequences + num_prompt_rows, num_sequences
        chosen = config.num_experts_per_tok
        counts = [config.neurons_of(layer) for layer in range(layers)]
        thresholds = config.scaled_neurons or 1

        def buffer(kind: torch.dtype, *shape: int, fill: float = 0) -> torch.Tensor:
            tensor = torch.zeros(shape, dtype=kind, device=device)
            return tensor.fill_(fill) if fill else tensor

        def host_buffer(kind: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=kind, pin_memory=device.type == "cuda")

        f32, i32, i64, u8 = torch.float32, torch.int32, torch.int64, torch.uint8
        state = cls(
            layout=layout,
            input_ids=buffer(i32, rows),
            row_sequence=buffer(i32, rows),
            row_position=buffer(i32, rows),
            active=buffer(i32, rows),
            run_ffn=buffer(i32, layers, rows),
            neuron_scale=buffer(f32, rows),
            prompt_embeddings=buffer(f32, num_prompt_rows, config.hidden_size),
            prompt_positions=buffer(i32, num_prompt_rows, 3),
            next_token=buffer(i32, sequences),
            token_ids=host_buffer(i32, sequences, max_seq_len + 1),
            seen=buffer(u8, sequences, config.vocab_size),
            num_generated=buffer(i32, sequences),
            progress=host_buffer(i32, sequences, 2),
            block_table=buffer(i32, sequences, table, fill=-1),
            temperature=buffer(f32, sequences),
            top_k=buffer(i32, sequences),
            top_p=buffer(f32, sequences, fill=1.0),
            min_p=buffer(f32, sequences),
            repetition_penalty=buffer(f32, sequences, fill=1.0),
            adjusts=buffer(i32, sequences),
            logit_bias=buffer(f32, sequences, config.vocab_size),
            frequency_penalty=buffer(f32, sequences),
            presence_penalty=buffer(f32, sequences),
            token_mask=buffer(i32, sequences, -(-config.vocab_size // 32)),
            seed=buffer(i64, sequences),
            num_logprobs=buffer(i32, sequences),
            logprobs=host_buffer(f32, sequences, max_seq_len, 1 + MAX_TOP_LOGPROBS),
            top_tokens=host_buffer(i32, sequences, max_seq_len, MAX_TOP_LOGPROBS),
            max_new_tokens=buffer(i32, sequences),
            eos_token_ids=buffer(i32, sequences, MAX_EOS, fill=-1),
            gate_mode=buffer(i32, sequences),
            gated=buffer(i32, layers, sequences),
            first_gated=buffer(i32, sequences),
            gate_threshold=buffer(f32, layers, sequences),
            gate_span=buffer(i32, sequences),
            warmup_tokens=buffer(i32, sequences),
            batch_rule=buffer(i32, sequences),
            gate_probability=buffer(f32, sequences),
            gate_seed=buffer(i64, sequences),
            target_ratio=buffer(f32, sequences),
            ramp_tokens=buffer(i32, sequences),
            gate_thresholds=buffer(f32, sequences, layers, thresholds if neurons else 0),
            product_thresholds=buffer(f32, sequences, layers),
            neuron_target_ratio=buffer(f32, sequences),
            skip_remaining=buffer(i32, sequences),
            skipped=buffer(i32, sequences),
            threshold_scale=buffer(f32, sequences, fill=1.0),
            left_out=buffer(i64, sequences),
            similarity=buffer(f32, layers, sequences, fill=float("nan")),
            similarity_partials=buffer(f32, partials, sequences, 3),
            run_map=host_buffer(u8, sequences, max_seq_len, layers),
            similarity_map=host_buffer(f32, sequences, max_seq_len, layers),
            scale_map=host_buffer(f32, sequences, max_seq_len),
            kept_map=host_buffer(i32, sequences, max_seq_len, layers, 2),
            neuron_shares=host_buffer(f32, layers, 2).fill_(1 / 3),
            neuron_counts=host_buffer(i32, layers).copy_(torch.tensor(counts)),
            no_thresholds=buffer(f32, sequences, layers, 1),
            hidden_states=buffer(f32, rows, config.hidden_size),
            qkv=buffer(f32, rows, config.qkv_size if config.norms_whole_qk else 0),
            branch=buffer(f32, rows, config.hidden_size),
            query=buffer(f32, rows, heads, config.head_dim),
            attn_partials=buffer(f32, rows, heads, splits, config.head_dim + 2),
            attn_output=buffer(f32, rows, heads, config.head_dim),
            intermediate=buffer(f32, rows, config.intermediate_size),
            neurons=buffer(i32, max(counts)),
            num_neurons=buffer(i32, 1),
            router_logits=buffer(f32, rows, config.num_experts),
            expert_ids=buffer(i32, rows, chosen),
            expert_weights=buffer(f32, rows, chosen),
            expert_begins=buffer(i32, config.num_experts + 1),
            expert_pairs=buffer(i32, rows * chosen),
            expert_intermediate=buffer(f32, rows, chosen, config.moe_intermediate_size),
            experts_read=buffer(i64, layers),
            logits=buffer(f32, sequences, config.vocab_size),
            k_cache=untouched_zeros(cache, dtype, device),
            v_cache=untouched_zeros(cache, dtype, device),
        )
        state.row_sequence[:sequences] = torch.arange(sequences, dtype=i32)
        return state

    def buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every buffer with its name."""
        for item in fields(self):
            if item.name != "layout":
                yield item.name, getattr(self, item.name)

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.block_table.shape[0]

    @property
    def num_prompt_rows(self) -> int:
        return self.prompt_embeddings.shape[0]

    @property
    def max_seq_len(self) -> int:
        return self.run_map.shape[1]

    @property
    def num_blocks(self) -> int:
        return self.k_cache.shape[1]

    @property
    def block_size(self) -> int:
        return self.k_cache.shape[3]

    @property
    def decode_rows(self) -> torch.Tensor:
        """``active`` of the decode rows, i32 [sequences]."""
        return self.active[: self.num_sequences]

    def cache_bytes(self) -> int:
        return 2 * self.k_cache.numel() * self.k_cache.element_size()

    def begin_sequence(self, slot: int, token_ids: torch.Tensor, num_generated: int = 0) -> None:
        """Gives ``slot`` the tokens (i32 [tokens], at least one) of a sequence, the last ``num_generated`` of them
        generated, and sets its decode row to the newest; ``start_decoding`` makes it active."""
        tokens = token_ids.numel()
        self.token_ids[slot].zero_()
        self.token_ids[slot, :tokens] = token_ids
        self.seen[slot].zero_()
        self.seen[slot, token_ids.to(self.seen.device).long()] = 1
        for token in token_ids[tokens - num_generated :].tolist():
            self.seen[slot, token] = counted(int(self.seen[slot, token]))
        self.input_ids[slot] = token_ids[-1]
        self.row_position[slot] = tokens - 1
        self.num_generated[slot] = num_generated
        self.active[slot] = 0
        self.progress[slot] = torch.tensor([num_generated, DECODING])
        self.run_ffn[:, slot] = 0
        self.skip_remaining[slot] = 0
        self.skipped[slot] = 0
        self.threshold_scale[slot] = 1.0
        self.left_out[slot] = 0
        self.scale_map[slot].zero_()
        self.similarity[:, slot] = float("nan")

    def start_decoding(self, slot: int) -> None:
        """Makes the decode row of ``slot`` active: for the first time, or again after it has waited for a block."""
        self.active[slot] = 1
        self.run_ffn[:, slot] = 1
        self.progress[slot, 1] = DECODING

    def end_sequence(self, slot: int) -> None:
        """Stops the decode row of ``slot`` from outside, as ``advance`` does from inside."""
        self.active[slot] = 0
        self.progress[slot, 1] = ENDED
        self.run_ffn[:, slot] = 0

    def set_policy(self, slot: int, plan: GatePlan | None) -> None:
        """The skip policy of ``slot``; None never skips."""
        blocks = plan is not None and bool(plan.gated_layers)
        self.gate_mode[slot] = 1 + GATE_MODES.index(plan.mode) if plan and blocks else 0
        self.gated[:, slot] = 0
        self._set_neuron_plan(slot, plan.neurons if plan else None)
        if plan is None:
            return
        # the first generated token comes out of the prompt's last position, and a prompt runs every FFN
        self.warmup_tokens[slot] = max(1, plan.warmup_tokens)
        if not blocks:
            return
        self.gated[list(plan.gated_layers), slot] = 1
        self.first_gated[slot] = plan.gated_layers[0]
        self.gate_threshold[:, slot] = torch.tensor(plan.thresholds or 0.0)
        self.gate_span[slot] = plan.span
        self.batch_rule[slot] = BATCH_RULES.index(plan.batch_rule)
        self.gate_probability[slot] = plan.probability
        self.gate_seed[slot] = plan.seed
        self.target_ratio[slot] = plan.target_ratio
        if plan.target_ratio:
            self.ramp_tokens[slot] = plan.ramp_tokens

    def _set_neuron_plan(self, slot: int, plan: NeuronPlan | None) -> None:
        self.gate_thresholds[slot] = gate_thresholds_of(plan).to(self.gate_thresholds) if plan else 0.0
        self.product_thresholds[slot] = torch.tensor(plan.product_thresholds if plan else 0.0)
        self.neuron_target_ratio[slot] = plan.target_ratio if plan else 0.0
        self.ramp_tokens[slot] = plan.ramp_tokens if plan else 0

    def unread_map(self, slot: int, tokens: int) -> torch.Tensor:
        """The share of each FFN's bytes that the first ``tokens`` generated tokens of ``slot`` did not read: f32
        [tokens, layers], 1 where the FFN was skipped."""
        run_map, scale_map, kept_map = (each[slot, :tokens] for each in (self.run_map, self.scale_map, self.kept_map))
        return unread_share(run_map, scale_map, kept_map, self.neuron_counts, self.neuron_shares)

    def set_blocks(self, slot: int, blocks: Sequence[int], first: int = 0) -> None:
        """Writes ``blocks`` into the table of ``slot``, from its entry ``first`` on; entries after them are emptied."""
        row = self.block_table[slot]
        row[first : first + len(blocks)] = torch.tensor(blocks, dtype=torch.int32, device=row.device)
        row[first + len(blocks) :] = -1

    def copy_block(self, source: int, target: int) -> None:
        """Copies a block's keys and values in every layer."""
        for cache in (self.k_cache, self.v_cache):
            cache[:, target] = cache[:, source]

    def set_prompt_rows(
        self,
        first: int,
        slot: int,
        start: int,
        token_ids: torch.Tensor,
        *,
        run_map: torch.Tensor | None = None,
        neuron_scale: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> None:
        """Makes prompt rows ``first``, ``first + 1``, ... of the next step active on consecutive tokens of ``slot``.

        Args:
            start: position of the first token.
            token_ids: i32 [tokens].
            run_map: u8 [tokens, layers]: which FFNs run, for tokens that were generated under a policy and are computed
                again; None: all.
            neuron_scale: f32 [tokens]: the factor on the thresholds for neurons, for the same; None: keep all.
            embeddings: f32 [tokens, hidden], in place of the tokens' own.
            positions: i32 [3, tokens], for models that rotate by three axes; None: the tokens' own positions.
        """
        tokens = token_ids.numel()
        chosen = slice(self.num_sequences + first, self.num_sequences + first + tokens)
        own = torch.arange(start, start + tokens, dtype=torch.int32, device=self.input_ids.device)
        self.input_ids[chosen] = token_ids.to(self.input_ids) if embeddings is None else -1
        self.row_sequence[chosen] = slot
        self.row_position[chosen] = own
        self.active[chosen] = 1
        self.run_ffn[:, chosen] = 1 if run_map is None else (run_map.T != 0).to(self.run_ffn)
        self.neuron_scale[chosen] = 0.0 if neuron_scale is None else neuron_scale.to(self.neuron_scale)
        if embeddings is not None:
            self.prompt_embeddings[first : first + tokens] = embeddings
        self.prompt_positions[first : first + tokens] = own[:, None] if positions is None else positions.T

    def settle(self) -> None:
        """Waits until the device has done all it was given: from then on the host may write to its buffers."""
        if self.active.is_cuda:
            torch.cuda.synchronize(self.active.device)


def gate_thresholds_of(plan: NeuronPlan) -> torch.Tensor:
    """Every neuron's gate threshold, f32 [layers, intermediate], or [layers, 1] where a layer's neurons share one: the
    layer's threshold divided by the neuron's scale, both in fp32 and rounded once. Executors only read this quotient,
    so all of them keep the same neurons."""
    thresholds = torch.tensor(plan.gate_thresholds, dtype=torch.float32)[:, None]
    if plan.up_scales is None:
        return thresholds
    return thresholds / torch.from_numpy(plan.up_scales.values.astype("float32"))


def unread_share(
    run_map: torch.Tensor,
    scale_map: torch.Tensor,
    kept_map: torch.Tensor,
    neuron_counts: torch.Tensor,
    neuron_shares: torch.Tensor,
) -> torch.Tensor:
    """The share of each FFN's bytes that was not read, f32 [tokens, layers], from ``DecodeState``'s maps of a sequence:
    run_map u8 [tokens, layers], scale_map f32 [tokens], kept_map i32 [tokens, layers, 2], its neuron_counts and
    neuron_shares.
    gate_proj is always read; where scale_map is 0 all neurons are, and kept_map means nothing."""
    left_out = ((1 - kept_map / neuron_counts[:, None]) * neuron_shares).sum(-1)
    unread = torch.where(scale_map[:, None] > 0, left_out, 0)
    return torch.where(run_map == 0, 1, unread).float()
