"""decode_attention over keys and values that are the same whatever the size of the cache's blocks is."""

from dataclasses import dataclass

import torch

from skipkernels.program.table import Instruction, instruction


@dataclass(frozen=True)
class AttentionCase:
    """``rows`` are sequences and positions; every sequence has ``positions`` cached."""

    rows: tuple[tuple[int, int], ...]
    positions: int
    heads: int
    kv_heads: int
    head_dim: int
    kv_split_size: int
    dtype: torch.dtype = torch.bfloat16

    def instruction(self, block_size: int, active: list[int], sliding_window: int = 0) -> Instruction:
        """The same keys, values and queries in blocks of any size, which lie in another order for each. What is behind
        the last position is NaN."""
        generator = torch.Generator().manual_seed(1)
        sequences = 1 + max(sequence for sequence, _ in self.rows)
        shape = (sequences, self.positions, self.kv_heads, self.head_dim)
        keys, values = torch.randn(2, *shape, generator=generator).to(self.dtype)
        query = torch.randn(len(self.rows), self.heads, self.head_dim, generator=generator)
        table = -(-self.positions // block_size)
        blocks = torch.randperm(sequences * table, generator=generator).view(sequences, table)
        positions = torch.arange(self.positions)
        caches = []
        for entries in (keys, values):
            cache = torch.full((sequences * table, self.kv_heads, block_size, self.head_dim), float("nan"))
            cache[blocks[:, positions // block_size], :, positions % block_size] = entries.float()
            caches.append(cache.to(self.dtype))
        splits = -(-self.positions // self.kv_split_size) + 1
        return instruction(
            "decode_attention",
            row_mask=torch.tensor([int(row in active) for row in range(len(self.rows))], dtype=torch.int32),
            query=query,
            k_cache=caches[0],
            v_cache=caches[1],
            block_table=blocks.to(torch.int32),
            row_sequence=torch.tensor([sequence for sequence, _ in self.rows], dtype=torch.int32),
            row_position=torch.tensor([position for _, position in self.rows], dtype=torch.int32),
            attn_partials=torch.full((len(self.rows), self.heads, splits, self.head_dim + 2), float("nan")),
            attn_output=torch.zeros(len(self.rows), self.heads, self.head_dim),
            scaling=self.head_dim**-0.5,
            softcap=0.0,
            sliding_window=sliding_window,
            kv_split_size=self.kv_split_size,
        )
