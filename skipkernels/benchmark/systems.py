"""The systems a decode bench compares: each decodes a few tokens and says how long every one of them took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import numpy as np
import torch

from skipkernels.engine import Engine
from skipkernels.model.config import ModelConfig
from skipkernels.model.weights import ModelWeights, parameter_views
from skipkernels.skipping.policy import DensePolicy, Policy, TimingPolicy

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

    from skipkernels.executors import ProfilingExecutor


@dataclass(frozen=True)
class Measurement:
    """One system's turn. ``seconds`` holds the decode steps past the first token; ``bytes_per_step`` what the mean one
    of them had to read; ``skip_ratio`` the share of FFN bytes that a row left out of it; ``first_token_s`` the time
    from the prompts to the last first token, where it was measured."""

    seconds: list[float]
    skip_ratio: float
    bytes_per_step: float
    first_token_s: float | None = None


class System(Protocol):
    name: str
    policy: Policy | None
    batch_size: int

    def decode(self, prompt_tokens: int, new_tokens: int) -> Measurement: ...

    def instruction_ms(self, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        """Milliseconds of a step spent in each op, by the executor's own clock; empty where there is none."""
        ...


class SkipkernelsSystem:
    """Our engine under one policy, with ``batch_size`` equal rows."""

    name = "skipkernels"

    def __init__(self, engine: Engine, policy: Policy, batch_size: int, prompt: list[int]) -> None:
        self._engine = engine
        self._policy = policy
        self.policy: Policy | None = policy
        self.batch_size = batch_size
        self._prompt = prompt

    def decode(self, prompt_tokens: int, new_tokens: int) -> Measurement:
        prompts = [self._prompt[:prompt_tokens]] * self.batch_size
        read_before = self._experts_read_by_first_tokens(prompts)
        self._engine.loop.forget_prefixes()  # each turn computes its prompts
        answers = self._engine.generate(prompts, max_new_tokens=new_tokens, eos_token_ids=(), policy=self._policy)
        seconds = answers[0].seconds_per_token[1:]
        unread = np.stack([answer.unread_map[1:] for answer in answers])  # [batch, steps, layers]
        # what is read is read once for all rows; these are equal, and so are their sets of neurons
        skipped_ffns = float(unread.min(axis=0).sum(axis=1).mean())
        config, weights = self._engine.config, self._engine.weights
        cached = cached_step_bytes(config, weights.dtype, self.batch_size, prompt_tokens, new_tokens)
        return Measurement(
            seconds=seconds,
            skip_ratio=float(unread.mean()),
            bytes_per_step=weights.decode_nbytes()
            + cached
            - skipped_ffns * weights.ffn_nbytes()
            + self._nbytes_of_more_experts(self._engine.state.experts_read - read_before, unread.min(axis=0)),
            first_token_s=max(answer.time_to_first_token_s for answer in answers),
        )

    def _experts_read_by_first_tokens(self, prompts: list[list[int]]) -> torch.Tensor:
        """The counters of experts as they will stand when every prompt has its first token."""
        if not self._engine.config.num_experts:
            return self._engine.state.experts_read
        before = self._engine.state.experts_read.clone()
        self._engine.loop.forget_prefixes()
        self._engine.generate(prompts, max_new_tokens=1, eos_token_ids=(), policy=self._policy)
        return self._engine.state.experts_read * 2 - before

    def _nbytes_of_more_experts(self, read: torch.Tensor, unread: np.ndarray) -> float:
        """Bytes of the experts that a step read beyond those of one token: rows choose others.

        Args:
            read: i64 [layers], experts whose matrices were read in all steps.
            unread: [steps, layers], the share of an FFN that no row read. Of the other experts as much is left out.
        """
        chosen = self._engine.config.num_experts_per_tok
        more = 0.0
        for layer, count, of_steps in zip(self._engine.weights.layers, read.tolist(), unread.T, strict=True):
            ran = of_steps < 1
            share = 1 - of_steps[ran].mean() if ran.any() else 0.0
            more += share * (count - chosen * ran.sum()) * layer.expert_nbytes() / len(of_steps)
        return float(more)

    def instruction_ms(self, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        executor = cast("ProfilingExecutor", self._engine.executor_for(self._policy))
        plan = self._policy.plan(self._engine.config.num_hidden_layers)
        spent: dict[str, float] = {}
        with self._engine.loop.own_rows() as own:
            for slot in range(self.batch_size):
                own.begin(slot, self._prompt[:prompt_tokens], plan)
            own.start()
            executor.run(1)  # the first token skips nothing
            for op, seconds in executor.profile(new_tokens - 1):
                spent[op] = spent.get(op, 0.0) + 1e3 * seconds / (new_tokens - 1)
        return spent


class TransformersSystem:
    """``generate`` of transformers on the same weights, greedy, with its default cache."""

    name = "transformers"
    policy: Policy | None = None
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: PreTrainedModel, config: ModelConfig, batch_size: int, prompt: list[int]) -> None:
        self._model: Any = model
        self._config = config
        self.batch_size = batch_size
        self._prompt = prompt

    @torch.inference_mode()
    def decode(self, prompt_tokens: int, new_tokens: int) -> Measurement:
        stamps = _Stamps()
        input_ids = torch.tensor([self._prompt[:prompt_tokens]] * self.batch_size, device=self._model.device)
        self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[stamps],
            **self.options,
        )
        dtype = self._model.dtype
        return Measurement(
            seconds=stamps.intervals(),
            skip_ratio=0.0,
            bytes_per_step=dense_step_bytes(self._config, dtype, self.batch_size, prompt_tokens, new_tokens),
        )

    def instruction_ms(self, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        return {}


class _Stamps:
    """A stopping criterion that never stops: transformers calls it once per token, whatever the batch size."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self._times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def intervals(self) -> list[float]:
        return [after - before for before, after in zip(self._times, self._times[1:], strict=False)]


def dense_step_bytes(
    config: ModelConfig, dtype: torch.dtype, batch_size: int, prompt_tokens: int, new_tokens: int
) -> float:
    """Bytes the mean step past the first reads with every FFN: weights once, cached keys and values of all rows."""
    cached = cached_step_bytes(config, dtype, batch_size, prompt_tokens, new_tokens)
    return config.decode_weight_bytes(dtype) + cached


def cached_step_bytes(
    config: ModelConfig, dtype: torch.dtype, batch_size: int, prompt_tokens: int, new_tokens: int
) -> float:
    """Bytes of cached keys and values, of all rows, that the mean step past the first reads."""
    lengths = range(prompt_tokens + 1, prompt_tokens + new_tokens)
    return batch_size * sum(config.kv_bytes(length, dtype) for length in lengths) / max(1, len(lengths))


def policies_for(ratios: list[float], calibrated: Policy | None, with_test_only: bool) -> list[Policy]:
    """Dense, then a policy for each ratio above 0: the calibrated one, or a forced one on random weights."""
    policies: list[Policy] = [DensePolicy()]
    if with_test_only:
        policies.append(TimingPolicy(0.0))
    policies += [calibrated or TimingPolicy(ratio) for ratio in ratios if ratio > 0]
    return policies


def module_over(weights: ModelWeights, config: ModelConfig, hf_config: PreTrainedConfig) -> PreTrainedModel:
    """A transformers Llama, of a LlamaConfig, on the packed matrices themselves: no second copy in memory."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    llama = cast("LlamaConfig", hf_config)
    with torch.device("meta"):
        module = LlamaForCausalLM(llama)
    state = {name: view.to(weights.dtype) for name, view in parameter_views(config, weights).items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    module.load_state_dict(state, assign=True)
    module.model.rotary_emb = LlamaRotaryEmbedding(llama)
    return module.eval()
