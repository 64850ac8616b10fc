"""The systems a decode bench compares: each decodes a few tokens and says how long every one of them took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch

from skipkernels.decoding.decoding import Decoding
from skipkernels.engine import Engine
from skipkernels.model.config import ModelConfig
from skipkernels.model.weights import ModelWeights, parameter_views
from skipkernels.skipping.policy import DensePolicy, Policy, TimingPolicy

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

    from skipkernels.executors import ProfilingExecutor


@dataclass(frozen=True)
class Measurement:
    """One system's turn. ``seconds`` holds the decode steps past the first token; ``bytes_per_step`` what the mean one
    of them had to read; ``skip_ratio`` the FFNs skipped in them."""

    seconds: list[float]
    skip_ratio: float
    bytes_per_step: float


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
        decoding = self._begin(prompt_tokens, new_tokens)
        decoding.step(new_tokens)
        seconds = decoding.rows[0].seconds[1:]
        ran = self._engine.state.run_map[: self.batch_size, 1:new_tokens] != 0  # [batch, steps, layers]
        loaded = ran.any(dim=0).float().sum(dim=1).mean()  # an FFN is read once for all rows, if any wants it
        config, dtype = self._engine.config, self._engine.weights.dtype
        skipped_ffns = config.num_hidden_layers - float(loaded)
        return Measurement(
            seconds=seconds,
            skip_ratio=1.0 - float(ran.float().mean()),
            bytes_per_step=dense_step_bytes(config, dtype, self.batch_size, prompt_tokens, new_tokens)
            - skipped_ffns * config.ffn_bytes(dtype),
        )

    def instruction_ms(self, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        self._begin(prompt_tokens, new_tokens).step(1)  # the first token skips nothing
        executor = cast("ProfilingExecutor", self._engine.executor_for(self._policy))
        spent: dict[str, float] = {}
        for op, seconds in executor.profile(new_tokens - 1):
            spent[op] = spent.get(op, 0.0) + 1e3 * seconds / (new_tokens - 1)
        return spent

    def _begin(self, prompt_tokens: int, new_tokens: int) -> Decoding:
        prompts = [self._prompt[:prompt_tokens]] * self.batch_size
        return self._engine.begin(prompts, max_new_tokens=new_tokens, eos_token_ids=(), policy=self._policy)


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
    lengths = range(prompt_tokens + 1, prompt_tokens + new_tokens)
    cached = batch_size * sum(config.kv_bytes(length, dtype) for length in lengths) / max(1, len(lengths))
    return config.decode_weight_bytes(dtype) + cached


def policies_for(ratios: list[float], calibrated: Policy | None, with_test_only: bool) -> list[Policy]:
    """Dense, then a policy for each ratio above 0: the calibrated one, or a forced one on random weights."""
    policies: list[Policy] = [DensePolicy()]
    if with_test_only:
        policies.append(TimingPolicy(0.0))
    policies += [calibrated or TimingPolicy(ratio) for ratio in ratios if ratio > 0]
    return policies


def module_over(weights: ModelWeights, config: ModelConfig, hf_config: LlamaConfig) -> PreTrainedModel:
    """A transformers Llama on the packed matrices themselves: no second copy in memory."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("meta"):
        module = LlamaForCausalLM(hf_config)
    state = {name: view.to(weights.dtype) for name, view in parameter_views(config, weights).items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    module.load_state_dict(state, assign=True)
    module.model.rotary_emb = LlamaRotaryEmbedding(hf_config)
    return module.eval()
