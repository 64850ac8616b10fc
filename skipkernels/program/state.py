"""DecodeState: every buffer of a decode, allocated once, with its shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from skipkernels.model.config import ModelConfig

MAX_BATCH_SIZE = 16
MAX_EOS = 16
"""End-of-sequence tokens one row may have."""


@dataclass(frozen=True)
class Layout:
    """How kernels cut their work, where the cut shows in a buffer's shape."""

    kv_split: int  # positions of one attention split
    rows_per_partial: int  # channels summed into one similarity partial: the row panel of the matrix kernels


LAYOUTS = {"cpu": Layout(kv_split=256, rows_per_partial=24), "cuda": Layout(kv_split=64, rows_per_partial=16)}
"""The layout the kernels of a device type want."""


@dataclass
class DecodeState:
    """The buffers of ``batch_size`` rows, each of at most ``max_seq_len`` positions.

    ``seq_len`` is the number of cached positions, and so the position of the row's current token ``input_ids``, which
    is the last of ``token_ids`` so far. ``active`` rows decode; all others are left alone by every instruction.

    Buffers marked *host* lie in the host's memory, pinned where the others are on a GPU: a step writes its results
    there, and they can be read while the device runs on.
    """

    layout: Layout

    # per row
    input_ids: torch.Tensor  # i32 [batch]
    next_token: torch.Tensor  # i32 [batch]
    token_ids: torch.Tensor  # host, i32 [batch, max_seq_len + 1], prompt and generated
    seen: torch.Tensor  # u8 [batch, vocab], 1 where the token stands in token_ids
    seq_len: torch.Tensor  # i32 [batch]
    generated: torch.Tensor  # i32 [batch], new tokens so far
    active: torch.Tensor  # i32 [batch]
    progress: torch.Tensor  # host, i32 [batch, 2]: generated, active
    # sampling, per row
    temperature: torch.Tensor  # f32 [batch], 0 is greedy
    top_k: torch.Tensor  # i32 [batch]
    top_p: torch.Tensor  # f32 [batch]
    min_p: torch.Tensor  # f32 [batch]
    repetition_penalty: torch.Tensor  # f32 [batch]
    seed: torch.Tensor  # i64 [batch]
    max_new_tokens: torch.Tensor  # i32 [batch]
    eos_token_ids: torch.Tensor  # i32 [batch, MAX_EOS], -1 pads
    # skipping
    run_ffn: torch.Tensor  # i32 [layers, batch], non-zero executes
    skip_remaining: torch.Tensor  # i32 [batch], FFNs the last trigger still skips
    skipped: torch.Tensor  # i32 [batch], FFNs skipped so far
    threshold_scale: torch.Tensor  # f32 [batch], what the ratio controller has made of 1 - threshold
    similarity: torch.Tensor  # f32 [layers, batch], NaN where not measured in this step
    similarity_partials: torch.Tensor  # f32 [partials, batch, 3]: <h, h'>, |h|^2, |h'|^2
    run_map: torch.Tensor  # host, u8 [batch, max_seq_len, layers], run_ffn of every generated token
    similarity_map: torch.Tensor  # host, f32 [batch, max_seq_len, layers]
    # activations
    hidden_states: torch.Tensor  # f32 [batch, hidden], the residual stream
    query: torch.Tensor  # f32 [batch, heads, head_dim]
    attn_partials: torch.Tensor  # f32 [batch, heads, splits, head_dim + 2]: max, sum, output
    attn_output: torch.Tensor  # f32 [batch, heads, head_dim]
    intermediate: torch.Tensor  # f32 [batch, intermediate]
    logits: torch.Tensor  # f32 [batch, vocab]
    # the cache, in the weights' dtype
    k_cache: torch.Tensor  # [layers, batch, kv_heads, max_seq_len, head_dim]
    v_cache: torch.Tensor  # [layers, batch, kv_heads, max_seq_len, head_dim]

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        *,
        batch_size: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layout: Layout | None = None,
    ) -> DecodeState:
        """Allocates all buffers; every row starts inactive. ``layout`` None is the device's own."""
        device = torch.device(device)
        layout = layout or LAYOUTS[device.type]
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        partials = -(-config.hidden_size // layout.rows_per_partial)
        splits = -(-max_seq_len // layout.kv_split) + 1  # a sliding window may straddle one more split than it fills
        cache = (layers, batch_size, config.num_key_value_heads, max_seq_len, config.head_dim)

        def buffer(kind: torch.dtype, *shape: int, fill: float = 0) -> torch.Tensor:
            # zeros() hands out untouched pages: a cache costs memory only where it is used
            tensor = torch.zeros(shape, dtype=kind, device=device)
            return tensor.fill_(fill) if fill else tensor

        def host_buffer(kind: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=kind, pin_memory=device.type == "cuda")

        f32, i32, u8 = torch.float32, torch.int32, torch.uint8
        return cls(
            layout=layout,
            input_ids=buffer(i32, batch_size),
            next_token=buffer(i32, batch_size),
            token_ids=host_buffer(i32, batch_size, max_seq_len + 1),
            seen=buffer(u8, batch_size, config.vocab_size),
            seq_len=buffer(i32, batch_size),
            generated=buffer(i32, batch_size),
            active=buffer(i32, batch_size),
            progress=host_buffer(i32, batch_size, 2),
            temperature=buffer(f32, batch_size),
            top_k=buffer(i32, batch_size),
            top_p=buffer(f32, batch_size, fill=1.0),
            min_p=buffer(f32, batch_size),
            repetition_penalty=buffer(f32, batch_size, fill=1.0),
            seed=buffer(torch.int64, batch_size),
            max_new_tokens=buffer(i32, batch_size),
            eos_token_ids=buffer(i32, batch_size, MAX_EOS, fill=-1),
            run_ffn=buffer(i32, layers, batch_size),
            skip_remaining=buffer(i32, batch_size),
            skipped=buffer(i32, batch_size),
            threshold_scale=buffer(f32, batch_size, fill=1.0),
            similarity=buffer(f32, layers, batch_size, fill=float("nan")),
            similarity_partials=buffer(f32, partials, batch_size, 3),
            run_map=host_buffer(u8, batch_size, max_seq_len, layers),
            similarity_map=host_buffer(f32, batch_size, max_seq_len, layers),
            hidden_states=buffer(f32, batch_size, config.hidden_size),
            query=buffer(f32, batch_size, heads, config.head_dim),
            attn_partials=buffer(f32, batch_size, heads, splits, config.head_dim + 2),
            attn_output=buffer(f32, batch_size, heads, config.head_dim),
            intermediate=buffer(f32, batch_size, config.intermediate_size),
            logits=buffer(f32, batch_size, config.vocab_size),
            k_cache=buffer(dtype, *cache),
            v_cache=buffer(dtype, *cache),
        )

    def buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every buffer with its name."""
        for item in fields(self):
            if item.name != "layout":
                yield item.name, getattr(self, item.name)

    @property
    def batch_size(self) -> int:
        return self.input_ids.shape[0]

    @property
    def max_seq_len(self) -> int:
        return self.k_cache.shape[3]

    def cache_bytes(self) -> int:
        return 2 * self.k_cache.numel() * self.k_cache.element_size()

    def begin_row(self, row: int, prompt: torch.Tensor) -> None:
        """Makes ``row`` active on a prompt (i32 [tokens], at least one) with all its positions but the last cached."""
        tokens = prompt.numel()
        self.token_ids[row].zero_()
        self.token_ids[row, :tokens] = prompt
        self.seen[row].zero_()
        self.seen[row, prompt.to(self.seen.device).long()] = 1
        self.input_ids[row] = prompt[-1]
        self.seq_len[row] = tokens - 1
        self.generated[row] = 0
        self.active[row] = 1
        self.progress[row] = torch.tensor([0, 1])
        self.run_ffn[:, row] = 1
        self.skip_remaining[row] = 0
        self.skipped[row] = 0
        self.threshold_scale[row] = 1.0
        self.similarity[:, row] = float("nan")

    def settle(self) -> None:
        """Waits until the device has done all it was given: from then on the host may write to its buffers."""
        if self.active.is_cuda:
            torch.cuda.synchronize(self.active.device)

    def end_row(self, row: int) -> None:
        """Stops ``row`` from outside, as ``advance`` does from inside."""
        self.active[row] = 0
        self.progress[row, 1] = 0
        self.run_ffn[:, row] = 0
