"""What else one can do with transformers on a GPU: its compiled static cache, and a CUDA graph of its forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from skipkernels.benchmark.systems import Measurement, TransformersSystem, dense_step_bytes
from skipkernels.model.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from skipkernels.skipping.policy import Policy


class CompiledSystem(TransformersSystem):
    """``generate`` with a static cache, for which transformers compiles the forward pass on a GPU."""

    name = "transformers compiled"
    options: ClassVar[dict[str, Any]] = {"cache_implementation": "static"}


class TorchGraphSystem:
    """The forward pass of the transformers module over a static cache, greedy, as one CUDA graph: what a few lines of
    torch give without a kernel of one's own."""

    name = "torch cuda graph"
    policy: Policy | None = None

    def __init__(self, model: PreTrainedModel, config: ModelConfig, batch_size: int, prompt: list[int]) -> None:
        self._model: Any = model
        self._config = config
        self.batch_size = batch_size
        self._prompt = prompt
        self._token = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
        self._cache: Any = None
        self._replay: Callable[[], object] = self._step

    @torch.inference_mode()
    def decode(self, prompt_tokens: int, new_tokens: int) -> Measurement:
        seconds: list[float] = []
        self.prefill(prompt_tokens)
        for _ in range(new_tokens - 1):
            started = time.perf_counter()
            self._replay()
            self._wait()
            seconds.append(time.perf_counter() - started)
        dtype = self._model.dtype
        return Measurement(
            seconds=seconds,
            skip_ratio=0.0,
            bytes_per_step=dense_step_bytes(self._config, dtype, self.batch_size, prompt_tokens, new_tokens),
        )

    def instruction_ms(self, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        return {}

    @torch.inference_mode()
    def prefill(self, prompt_tokens: int) -> torch.Tensor:
        """Fills the cache and leaves the first token [batch, 1]; later tokens appear in the same tensor."""
        from transformers import StaticCache

        prompt = torch.tensor([self._prompt[:prompt_tokens]] * self.batch_size, device=self._token.device)
        first = self._cache is None
        if first:
            self._cache = StaticCache(config=self._model.config, max_cache_len=self._config.max_position_embeddings)
        self._cache.reset()
        logits = self._model(input_ids=prompt, past_key_values=self._cache).logits
        self._token.copy_(logits[:, -1:].argmax(dim=-1))
        if first and self._token.is_cuda:
            self._capture()
            return self.prefill(prompt_tokens)
        return self._token

    @torch.inference_mode()
    def step(self) -> None:
        self._replay()

    def _step(self) -> None:
        logits = self._model(input_ids=self._token, past_key_values=self._cache).logits
        self._token.copy_(logits[:, -1:].argmax(dim=-1))

    def _capture(self) -> None:
        device = self._token.device
        side, user = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        side.wait_stream(user)
        with torch.cuda.stream(side):  # and its device
            for _ in range(2):  # cuBLAS and the allocator settle before a capture
                self._step()
        user.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=side):
            self._step()
        self._replay = graph.replay

    def _wait(self) -> None:
        if self._token.is_cuda:
            torch.cuda.synchronize(self._token.device)
