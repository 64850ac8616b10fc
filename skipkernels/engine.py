"""Engine: a checkpoint or module, a policy, and prompts in; text out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from skipkernels.decoding.decoding import Decoding, Row
from skipkernels.decoding.generation import (
    Generation,
    SamplingParams,
    StreamChunk,
    checked_count,
    checked_eos,
    checked_stop,
    default_sampling,
)
from skipkernels.decoding.prefill import prefill
from skipkernels.errors import DeviceError, PolicyError, RequestError
from skipkernels.executors import Executor, get_executor
from skipkernels.executors.execution import Execution
from skipkernels.model.checkpoint import (
    default_eos_token_ids,
    load_config,
    load_generation_config,
    load_tokenizer,
    resolve_checkpoint,
)
from skipkernels.model.config import ModelConfig, dtype_name, resolve_dtype
from skipkernels.model.module_check import shares_embeddings
from skipkernels.model.prompt import EmbeddedPrompt
from skipkernels.model.prompts import Prompt, encode, listed_prompts, single_prompt
from skipkernels.model.shards import Shards
from skipkernels.model.weights import ModelWeights, fill_rope, load_checkpoint, pack_module
from skipkernels.program import build_program
from skipkernels.program.state import MAX_BATCH_SIZE, MAX_EOS, DecodeState
from skipkernels.skipping.policy import DensePolicy, Policy
from skipkernels.skipping.policy_file import load_policy
from skipkernels.support.turns import Turns

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MAX_SEQ_LEN = 4096
_KEPT_EXECUTORS = 8


class Engine:
    """Decodes with one set of weights and one set of buffers. Threads that share it take turns: ``generate`` runs to
    its end, and a stream ends with an error when another thread's request takes its place."""

    @torch.inference_mode(False)
    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        policy: Policy | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        generation_config: GenerationConfig | None = None,
        max_seq_len: int,
        max_batch_size: int = 1,
        execution: Execution | None = None,
    ) -> None:
        """``execution``, by default every processor of the cpu, is for the device the weights are on."""
        _check_batch_size(max_batch_size)
        self.execution = (execution or Execution()).resolved()
        if weights.embed_tokens.is_cuda != self.execution.on_gpu:
            raise DeviceError(f"the weights are on {weights.embed_tokens.device}, not on {self.execution.device}")
        self.config = config
        self.weights = weights
        self.tokenizer = tokenizer
        self.fingerprint = weights.fingerprint(config)
        try:
            self.state = DecodeState.allocate(
                config,
                batch_size=max_batch_size,
                max_seq_len=max_seq_len,
                dtype=weights.dtype,
                device=self.execution.device,
            )
        except RuntimeError as error:  # what torch's allocators raise
            raise DeviceError(
                f"no memory for {max_batch_size} rows of {max_seq_len} positions ({str(error).splitlines()[0]})"
            ) from error
        self.generation_config = generation_config
        self.default_eos_token_ids = default_eos_token_ids(tokenizer, generation_config)
        self._turns = Turns(on_gpu=self.execution.on_gpu)
        self._executors: dict[Policy, Executor] = {}
        self._decoding: Decoding | None = None
        self.policy = policy or DensePolicy()
        self.executor_for(self.policy)  # an impossible policy is refused here, not at the first prompt

    @classmethod
    @torch.inference_mode(False)
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel,
        *,
        policy: Policy | str | Path | None = None,
        device: str = "cpu",
        dtype: str | torch.dtype | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int = 1,
        executor: str = "auto",
        num_threads: int | None = None,
        kernels: str = "auto",
        conditional: str = "auto",
        loop: str = "auto",
        debug: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Engine:
        """Loads a model for decoding.

        Args:
            model: a folder with a Hugging Face checkpoint, a hub id, or a loaded ``transformers`` module, whose
                parameters become views of the packed weights. Of a multimodal module its text decoder is taken.
            policy: which FFNs to skip: a policy, or the path of a ``skip_policy.json``; None is dense.
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: fp32, bf16 or fp16; None takes the checkpoint's own.
            max_seq_len: cached positions per row; None: the model's maximum, at most 4096.
            max_batch_size: rows decoded together, 1 to 16.
            executor, num_threads, kernels, conditional, loop, debug: see ``Execution``.
            tokenizer: None loads the checkpoint's, where it has one.

        Raises:
            ModelError, PolicyError, RequestError, DeviceError: nothing was loaded; the message says what to change.
        """
        from transformers import PreTrainedModel

        execution = Execution(device, executor, num_threads, kernels, conditional, loop, debug).resolved()
        _check_batch_size(max_batch_size)
        wanted = None if dtype is None else resolve_dtype(dtype)
        folder = None if isinstance(model, PreTrainedModel) else resolve_checkpoint(model)
        hf_config = load_config(folder) if folder else cast("PreTrainedModel", model).config.get_text_config()
        config = ModelConfig.from_hf(hf_config)
        if folder is None:
            config = replace(config, tie_word_embeddings=shares_embeddings(cast("PreTrainedModel", model)))
        shards = None if folder is None else Shards(folder)
        if shards is not None:
            config = replace(config, tie_word_embeddings=shards.head_is_tied(config))
        length = max_seq_len if max_seq_len is not None else min(config.reach, DEFAULT_MAX_SEQ_LEN)
        config.check_length(length)
        if isinstance(policy, Policy):
            policy.plan(config.num_hidden_layers)  # before gigabytes are read
        if wanted is None:
            wanted = resolve_dtype(hf_config.dtype or "fp32") if folder else cast("PreTrainedModel", model).dtype
        _check_memory(config, wanted, length, max_batch_size, device)
        module = cast("PreTrainedModel", model) if folder is None else None
        given_tokenizer = tokenizer
        if module is not None:
            weights = pack_module(module, config, wanted, length, device)
            generation_config: GenerationConfig | None = module.generation_config
        else:
            weights = load_checkpoint(cast(Shards, shards), config, wanted, length, device)
            tokenizer = load_tokenizer(cast(Path, folder)) if tokenizer is None else tokenizer
            generation_config = load_generation_config(cast(Path, folder))
        fill_rope(weights, hf_config, module)
        if isinstance(policy, str | Path):
            policy = load_policy(policy, fingerprint=weights.fingerprint(config))
        engine = cls(
            config,
            weights,
            policy=policy,
            tokenizer=tokenizer,
            generation_config=generation_config,
            max_seq_len=length,
            max_batch_size=max_batch_size,
            execution=execution,
        )
        # a folder's own tokenizer has no say in where answers end, as in transformers
        engine.default_eos_token_ids = default_eos_token_ids(given_tokenizer, generation_config)
        return engine

    def with_rows(self, max_batch_size: int) -> Engine:
        """Another engine on the same weights, for another number of rows."""
        other = Engine(
            self.config,
            self.weights,
            policy=self.policy,
            tokenizer=self.tokenizer,
            generation_config=self.generation_config,
            max_seq_len=self.max_seq_len,
            max_batch_size=max_batch_size,
            execution=self.execution,
        )
        other.default_eos_token_ids = self.default_eos_token_ids
        return other

    @property
    def max_seq_len(self) -> int:
        return self.state.max_seq_len

    @property
    def max_batch_size(self) -> int:
        return self.state.batch_size

    @property
    def dtype(self) -> str:
        return dtype_name(self.weights.dtype)

    def executor_for(self, policy: Policy) -> Executor:
        """The executor of the program recorded for ``policy``; recorded at its first use, and kept for a while."""
        if not isinstance(policy, Policy):
            raise PolicyError(f"a policy is wanted, got a {type(policy).__name__}; load_policy reads one from a file")
        if policy not in self._executors:
            if len(self._executors) >= _KEPT_EXECUTORS:  # a sweep over policies must not pile up threads
                del self._executors[next(iter(self._executors))]
            program = build_program(self.config, self.weights, self.state, policy)
            self._executors[policy] = get_executor(self.execution, program, self.state)
        return self._executors[policy]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        stop: Sequence[str] = (),
        eos_token_ids: Sequence[int] | int | None = None,
        policy: Policy | None = None,
    ) -> list[Generation]:
        """Generates for up to ``max_batch_size`` prompts together and returns their answers in order.

        Args:
            prompts: one prompt or several; a prompt is text, token ids, a chat, or embeddings.
            max_new_tokens: None: until an end-of-sequence token or a full cache.
            sampling: one for all prompts or one each; None is greedy, with the model's own repetition penalty.
            stop: strings that end a generation; they are not part of its text.
            eos_token_ids: tokens that end a generation, or one; None: the model's own.
            policy: overrides the engine's policy for this call.

        Raises:
            RequestError: nothing was generated; the message says what to change.
        """
        with self._turns.take():
            decoding = self.begin(
                prompts,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop=stop,
                eos_token_ids=eos_token_ids,
                policy=policy,
            )
            if stop:  # which has to see every token
                for _ in decoding.steps():
                    for row in decoding.rows:
                        row.take_text()
            else:
                decoding.step(self.max_seq_len)
            return decoding.results()

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        eos_token_ids: Sequence[int] | int | None = None,
        policy: Policy | None = None,
    ) -> Iterator[StreamChunk]:
        """Generates for one prompt and yields each token as it comes; arguments as in ``generate``."""
        decoding = self.begin(
            [single_prompt(prompt)],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            eos_token_ids=eos_token_ids,
            policy=policy,
        )
        (row,) = decoding.rows
        steps = decoding.steps()
        try:
            while True:
                with self._turns.take():
                    if next(steps, steps) is steps:
                        break
                    chunk = StreamChunk(row.take_text(), row.token_ids[-1])
                yield chunk
            with self._turns.take():
                chunk = StreamChunk(row.take_rest(), None, decoding.results()[0])
            yield chunk
        finally:
            decoding.end()

    def begin(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        stop: Sequence[str] = (),
        eos_token_ids: Sequence[int] | int | None = None,
        policy: Policy | None = None,
    ) -> Decoding:
        """Checks a whole request, then prefills its rows; nothing is touched when a check fails.

        The lower half of ``generate`` and ``stream``, for callers with a loop of their own. Arguments as there.
        """
        listed = listed_prompts(prompts)
        if not listed:
            raise RequestError("no prompt was given")
        if len(listed) > self.max_batch_size:
            raise RequestError(
                f"{len(listed)} prompts do not fit max_batch_size={self.max_batch_size}; "
                f"split them or load the engine with a larger one (at most {MAX_BATCH_SIZE})"
            )
        stop = checked_stop(stop)
        if stop:
            self._require_tokenizer("a stop string")
        if sampling is None:
            sampling = default_sampling(self.generation_config)
        if isinstance(sampling, SamplingParams):
            sampling = [sampling] * len(listed)
        if len(sampling) != len(listed):
            raise RequestError(f"{len(sampling)} sampling parameters for {len(listed)} prompts")
        eos = self.default_eos_token_ids if eos_token_ids is None else checked_eos(eos_token_ids)
        if len(eos) > MAX_EOS:
            raise RequestError(f"{len(eos)} end-of-sequence tokens; at most {MAX_EOS} are possible")
        max_new_tokens = None if max_new_tokens is None else checked_count("max_new_tokens", max_new_tokens)
        token_ids = [self._checked_tokens(self.encode(prompt), max_new_tokens) for prompt in listed]
        embedded = [prompt if isinstance(prompt, EmbeddedPrompt) else None for prompt in listed]
        for given in embedded:
            if given is not None:
                given.check(self.config, self.weights.embed_tokens, self.max_seq_len)

        with self._turns.take():
            executor = self.executor_for(self.policy if policy is None else policy)
            if self._decoding:
                self._decoding.taken_over = True
                self.state.settle()  # an abandoned stream may have left steps behind on the device
            for index in range(self.max_batch_size):
                self.state.end_row(index)
            started = time.perf_counter()
            rows = []
            for index, (tokens, param, given) in enumerate(zip(token_ids, sampling, embedded, strict=True)):
                self._set_row(index, param, max_new_tokens, eos)
                ids = torch.tensor(tokens, dtype=torch.int32)
                prefill(self.config, self.weights, self.state, index, ids, embedded=given)
                rows.append(Row(self.state, index, len(tokens), self.tokenizer, stop))
            self._decoding = Decoding(executor, rows, time.perf_counter() - started, self._turns)
            return self._decoding

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text with the tokenizer's special tokens, a chat through its template."""
        given = single_prompt(prompt)
        if isinstance(given, EmbeddedPrompt):
            return list(given.token_ids)
        if isinstance(given, str) or (given and isinstance(given[0], dict)):
            return encode(
                given, self._require_tokenizer("a text prompt" if isinstance(given, str) else "a chat prompt")
            )
        return list(cast(Sequence[int], given))

    def _require_tokenizer(self, what: str) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise RequestError(f"{what} needs a tokenizer, and this model was loaded without one; pass token ids")
        return self.tokenizer

    def _checked_tokens(self, tokens: list[int], max_new_tokens: int | None) -> list[int]:
        if not tokens and self.tokenizer is not None and self.tokenizer.bos_token_id is not None:
            tokens = [self.tokenizer.bos_token_id]
        if not tokens:
            raise RequestError("the prompt is empty and the model has no beginning-of-sequence token to start from")
        if len(tokens) > self.max_seq_len:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, the cache holds max_seq_len={self.max_seq_len}; "
                "shorten it or load the engine with a larger max_seq_len"
            )
        room = self.max_seq_len - len(tokens) + 1  # the last token is not cached
        if max_new_tokens is not None and max_new_tokens > room:
            raise RequestError(
                f"max_new_tokens={max_new_tokens} does not fit: {len(tokens)} prompt tokens leave room for {room} "
                f"in max_seq_len={self.max_seq_len}"
            )
        outside = [token for token in tokens if not 0 <= token < self.config.vocab_size]
        if outside:
            raise RequestError(f"token id {outside[0]} is outside the vocabulary of {self.config.vocab_size}")
        return tokens

    def _set_row(self, row: int, sampling: SamplingParams, max_new_tokens: int | None, eos: Sequence[int]) -> None:
        s = self.state
        s.temperature[row] = sampling.temperature
        s.top_k[row] = min(sampling.top_k, self.config.vocab_size)
        s.top_p[row] = sampling.top_p
        s.min_p[row] = sampling.min_p
        s.repetition_penalty[row] = sampling.repetition_penalty
        s.seed[row] = sampling.seed
        s.max_new_tokens[row] = self.max_seq_len + 1 if max_new_tokens is None else max_new_tokens
        s.eos_token_ids[row] = -1
        s.eos_token_ids[row, : len(eos)] = torch.tensor(list(eos), dtype=torch.int32)


def _check_batch_size(max_batch_size: int) -> None:
    if not 1 <= max_batch_size <= MAX_BATCH_SIZE:
        raise RequestError(f"max_batch_size must lie in 1..{MAX_BATCH_SIZE}, got {max_batch_size}")


def _check_memory(config: ModelConfig, dtype: torch.dtype, max_seq_len: int, batch_size: int, device: str) -> None:
    """Refuses a model that does not fit a GPU before a byte of it is read."""
    if not device.startswith("cuda"):
        return
    weights, cache = config.weight_bytes(dtype), config.cache_bytes(batch_size, max_seq_len, dtype)
    free, total = torch.cuda.mem_get_info(torch.device(device))
    if weights + cache > free:
        gib = 2**30
        raise DeviceError(
            f"the model needs {(weights + cache) / gib:.1f} GiB ({weights / gib:.1f} of weights, {cache / gib:.1f} of "
            f"cache for {batch_size} rows of {max_seq_len} positions), and {device} has {free / gib:.1f} GiB free of "
            f"{total / gib:.1f}; use a smaller max_seq_len, max_batch_size or dtype"
        )
