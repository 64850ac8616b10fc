"""A tiny model decoded by an executor alone: the test says which rows a step has, where an engine would."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from skipkernels.executors import Executor
from skipkernels.executors.cpu import CpuExecutor
from skipkernels.executors.reference import ReferenceExecutor
from skipkernels.model.config import ModelConfig
from skipkernels.model.module_check import shares_embeddings
from skipkernels.model.weights import ModelWeights, fill_rope, pack_module
from skipkernels.program import Program, build_program
from skipkernels.program.state import LAYOUTS, DecodeState
from skipkernels.skipping.policy import Policy

MakeExecutor = Callable[[Program, DecodeState], Executor]


def natively(program: Program, state: DecodeState) -> Executor:
    return CpuExecutor(program, state, num_threads=1)


def packed(module: PreTrainedModel, max_seq_len: int) -> tuple[ModelConfig, ModelWeights]:
    """A module's text decoder as the program takes it."""
    hf_config = module.config.get_text_config(decoder=True)
    config = replace(ModelConfig.from_hf(hf_config), tie_word_embeddings=shares_embeddings(module))
    weights = pack_module(module, config, None, max_seq_len)
    fill_rope(weights, hf_config)
    return config, weights


class Decoder:
    """A state over a packed model, its program, and an executor."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        make_executor: MakeExecutor = ReferenceExecutor,
        *,
        num_sequences: int = 1,
        num_prompt_rows: int = 8,
        block_size: int = 16,
        gated: bool = False,
    ) -> None:
        self.config = config
        self.state = DecodeState.allocate(
            config,
            num_sequences=num_sequences,
            num_prompt_rows=num_prompt_rows,
            max_seq_len=len(weights.rope_cos),
            dtype=weights.dtype,
            layout=replace(LAYOUTS["cpu"], block_size=block_size),
        )
        self.program = build_program(config, weights, self.state, gated=gated)
        self.executor = make_executor(self.program, self.state)
        # in no order, as after a while of serving
        self._free = torch.randperm(self.state.num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
        self._prompt_rows = 0

    def begin(
        self,
        slot: int,
        tokens: Sequence[int],
        *,
        policy: Policy | None = None,
        new_tokens: int = 8,
        num_generated: int = 0,
    ) -> None:
        """Gives ``slot`` a sequence, whose decode row does not run yet."""
        self.state.begin_sequence(slot, torch.tensor(tokens, dtype=torch.int32), num_generated)
        self.state.set_policy(slot, policy.plan(self.config.num_hidden_layers) if policy else None)
        self.state.max_new_tokens[slot] = new_tokens

    def give_blocks(self, slot: int, positions: int | None = None, shared: Iterable[int] = ()) -> list[int]:
        """Blocks for so many positions (None: for all), the first of them ``shared`` with others; returns them all."""
        positions = self.state.max_seq_len if positions is None else positions
        blocks = list(shared)
        while len(blocks) * self.state.block_size < positions:
            blocks.append(self.free_block())
        self.state.set_blocks(slot, blocks)
        return blocks

    def free_block(self) -> int:
        """A block nobody has had yet."""
        return self._free.pop(0)

    def add_prompt_rows(self, slot: int, start: int, tokens: Sequence[int], **options: Any) -> None:
        """More prompt rows for the next step; options of ``DecodeState.set_prompt_rows``."""
        ids = torch.tensor(tokens, dtype=torch.int32)
        self.state.set_prompt_rows(self._prompt_rows, slot, start, ids, **options)
        self._prompt_rows += len(tokens)

    def step(self) -> None:
        """One step with the rows that are set."""
        assert len(self.executor.run(1)) == 1
        self._prompt_rows = 0

    def feed(self, slot: int, tokens: Sequence[int], start: int = 0) -> None:
        """Caches tokens from position ``start`` on, as many in a step as there are prompt rows."""
        while start < len(tokens):
            end = min(start + self.state.num_prompt_rows, len(tokens))
            self.add_prompt_rows(slot, start, tokens[start:end])
            self.step()
            start = end

    def decode(self, *slots: int) -> None:
        """Runs the decode rows of ``slots`` until they end or wait, beside those that are active already."""
        for slot in slots:
            self.state.start_decoding(slot)
        self.executor.run(self.state.max_seq_len)

    def token_ids(self, slot: int) -> list[int]:
        """All tokens so far."""
        return self.state.token_ids[slot, : int(self.state.row_position[slot]) + 1].tolist()

    def cached(self, slot: int, positions: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [layers, kv_heads, positions, head_dim]; None: of all positions before the decode row's."""
        positions = int(self.state.row_position[slot]) if positions is None else positions
        blocks = self.state.block_table[slot].clamp(min=0).long()
        keys, values = (
            cache[:, blocks].transpose(1, 2).flatten(2, 3)[:, :, :positions]
            for cache in (self.state.k_cache, self.state.v_cache)
        )
        return keys, values
