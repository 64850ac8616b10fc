"""Engine: a checkpoint or module, a policy, and prompts in; text out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from skipkernels.decoding.cache_size import cache_blocks, check_memory
from skipkernels.decoding.decoding import Decoding
from skipkernels.decoding.generation import (
    Generation,
    SamplingParams,
    StreamChunk,
    checked_count,
    checked_eos,
    checked_stop,
    default_sampling,
)
from skipkernels.decoding.handle import Handle
from skipkernels.decoding.loop import DecodeLoop
from skipkernels.decoding.prompt_rows import ProgramRows, TorchRows
from skipkernels.decoding.request import Request
from skipkernels.errors import DeviceError, PolicyError, RequestError
from skipkernels.executors import Executor
from skipkernels.executors.comparison import ComparingExecutor
from skipkernels.executors.execution import Execution
from skipkernels.executors.support import refuse_while_capturing
from skipkernels.executors.variants import Variants
from skipkernels.model import gguf_config
from skipkernels.model.block_weights import load_as_floats, load_in_formats
from skipkernels.model.blocks_of_experts import blocks_of_experts
from skipkernels.model.checkpoint import (
    default_eos_token_ids,
    load_config,
    load_generation_config,
    load_tokenizer,
    resolve_checkpoint,
)
from skipkernels.model.config import ModelConfig, quantization_of, resolve_dtype
from skipkernels.model.float_parameters import FloatParameters
from skipkernels.model.gguf_file import GgufFile
from skipkernels.model.gguf_tensors import GgufTensors
from skipkernels.model.gguf_tokenizer import load_gguf_tokenizer
from skipkernels.model.module_check import check_module, shares_embeddings
from skipkernels.model.packed.packed_parameters import shard_parameters
from skipkernels.model.parameters import Parameters
from skipkernels.model.prompt import EmbeddedPrompt
from skipkernels.model.prompts import Prompt, encode, listed_prompts, single_prompt
from skipkernels.model.quantized import QuantizedParameters
from skipkernels.model.recipe import matrix_formats, resolve_weights
from skipkernels.model.shards import Shards
from skipkernels.model.weights import (
    ModelWeights,
    as_saved,
    expected_parameters,
    expected_tensors,
    fill_rope,
    interleave,
    into_planes,
    load_checkpoint,
    no_neurons_of_experts,
    pack_module,
    stacks_experts,
)
from skipkernels.program.program import NO_NEURON_ROWS, Variant
from skipkernels.program.state import MAX_EOS, DecodeState
from skipkernels.skipping.policy import DensePolicy, GatePlan, Policy
from skipkernels.skipping.policy_file import load_policy
from skipkernels.support.machine import default_threads
from skipkernels.support.memory import give_back_freed_memory

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MAX_SEQ_LEN = 4096
PROMPT_ROWS = 240
"""Prompt tokens computed in one step on a CPU: enough for the matrix kernels to be bound by arithmetic."""


class Engine:
    """Decodes with one set of weights, one set of buffers and one paged cache, for any number of requests at once.

    Safe to use from several threads: requests of all of them share the steps.
    """

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
        cache_bytes: int | None = None,
        execution: Execution | None = None,
    ) -> None:
        """``execution``, by default every processor of the cpu, is for the device the weights are on."""
        _check_batch_size(max_batch_size)
        self.execution = (execution or Execution()).resolved()
        refuse_while_capturing(self.execution.device)
        if (weights.embed_tokens.device.type == "cuda") != self.execution.on_gpu:
            raise DeviceError(f"the weights are on {weights.embed_tokens.device}, not on {self.execution.device}")
        if self.execution.executor == "cpu":
            interleave(weights, self.execution.num_threads or default_threads())
        if self.execution.on_gpu:
            into_planes(weights)
        self.config = config
        self.weights = weights
        self.tokenizer = tokenizer
        self.fingerprint = weights.fingerprint(config)
        device, on_gpu = self.execution.device, self.execution.on_gpu
        blocks = cache_blocks(config, weights.dtype, device, max_batch_size, max_seq_len, cache_bytes)
        try:
            self.state = DecodeState.allocate(
                config,
                num_sequences=max_batch_size,
                num_prompt_rows=0 if on_gpu else PROMPT_ROWS,
                max_seq_len=max_seq_len,
                num_blocks=blocks,
                neurons=weights.neuron_rows,
                dtype=weights.dtype,
                device=device,
            )
        except RuntimeError as error:  # what torch's allocators raise
            raise DeviceError(
                f"no memory for {max_batch_size} sequences of {max_seq_len} positions ({str(error).splitlines()[0]})"
            ) from error
        self.state.neuron_shares.copy_(weights.neuron_shares())
        self.generation_config = generation_config
        self.default_eos_token_ids = default_eos_token_ids(tokenizer, generation_config)
        rows = TorchRows if on_gpu else ProgramRows
        self._variants = Variants(config, weights, self.state, self.execution)
        self.loop = DecodeLoop(self.state, rows(config, weights, self.state), self._variants, tokenizer)
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
        cache_bytes: int | None = None,
        executor: str = "auto",
        num_threads: int | None = None,
        kernels: str = "auto",
        conditional: str = "auto",
        loop: str = "auto",
        debug: bool = False,
        neuron_rows: bool | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Engine:
        """Loads a model for decoding.

        Args:
            model: a folder with a Hugging Face checkpoint, a hub id, a GGUF file or a folder with one, or a loaded
                ``transformers`` module, whose parameters become views of the packed weights. Of a multimodal model
                its text decoder is taken.
            policy: which FFNs to skip: a policy, or the path of a ``skip_policy.json``; None is dense.
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: fp32, bf16 or fp16; or a type that matrices are quantised to while they are read, one of
                ``recipe.RECIPES`` (q8_0, q4_0, ...), as llama.cpp would: norms and biases stay fp32, the head is q6_k
                or q8_0. None takes the checkpoint's own, which of a GGUF file are its block formats.
            max_seq_len: cached positions per sequence; None: the model's maximum, at most 4096.
            max_batch_size: sequences decoded together; more requests wait for a place.
            cache_bytes: size of the paged KV cache that they share; what they do not need keeps prompts that may come
                again. None: room for all of them at ``max_seq_len``, but at most half of the memory that is free.
            executor, num_threads, kernels, conditional, loop, debug: see ``Execution``.
            neuron_rows: let ``down_proj`` lie transposed, so that policies can leave out single neurons; None: where
                ``policy`` does. Every policy can be used with such weights.
            tokenizer: None loads the checkpoint's, where it has one.

        Raises:
            ModelError, PolicyError, RequestError, DeviceError: nothing was loaded; the message says what to change.
        """
        execution = Execution(device, executor, num_threads, kernels, conditional, loop, debug).resolved()
        refuse_while_capturing(execution.device)  # before the module's parameters are moved
        _check_batch_size(max_batch_size)
        read = load_policy(policy) if isinstance(policy, str | Path) else policy  # whose it is, is checked below
        weights = resolve_weights(dtype)
        wanted = _Wanted(
            device=device,
            dtype=weights if isinstance(weights, torch.dtype) else None,
            recipe=weights if isinstance(weights, str) else None,
            max_seq_len=max_seq_len,
            policy=read,
            neuron_rows=neuron_rows,
        )
        is_module = _is_module(model)
        if is_module:
            loaded = _from_module(cast("PreTrainedModel", model), wanted, tokenizer)
        else:
            loaded = _from_checkpoint(cast("str | Path", model), wanted, tokenizer)
            give_back_freed_memory()  # before weights are arranged for the kernels, which copies them
        if isinstance(policy, str | Path):
            policy = load_policy(policy, fingerprint=loaded.weights.fingerprint(loaded.config))
        engine = cls(
            loaded.config,
            loaded.weights,
            policy=policy,
            tokenizer=loaded.tokenizer,
            generation_config=loaded.generation_config,
            max_seq_len=loaded.max_seq_len,
            max_batch_size=max_batch_size,
            cache_bytes=cache_bytes,
            execution=execution,
        )
        engine.loop.weights_may_change = is_module
        if not is_module:
            give_back_freed_memory()  # what the arranging took
        # a folder's own tokenizer has no say in where answers end, as in transformers
        engine.default_eos_token_ids = default_eos_token_ids(tokenizer, loaded.generation_config)
        return engine

    def with_rows(self, max_batch_size: int, cache_bytes: int | None = None) -> Engine:
        """Another engine on the same weights, for another number of rows."""
        return self._sibling(self.config, self.weights, self.policy, max_batch_size, cache_bytes)

    def without_layers(self, removed: Collection[int]) -> Engine:
        """Another engine on the same weights, for as many rows, that knows nothing of some layers; dense."""
        kept = [layer for layer in range(self.config.num_hidden_layers) if layer not in removed]
        weights = replace(self.weights, layers=[self.weights.layers[layer] for layer in kept])
        return self._sibling(self.config.with_layers(kept), weights, DensePolicy(), self.max_batch_size, None)

    def _sibling(
        self, config: ModelConfig, weights: ModelWeights, policy: Policy, max_batch_size: int, cache_bytes: int | None
    ) -> Engine:
        other = Engine(
            config,
            weights,
            policy=policy,
            tokenizer=self.tokenizer,
            generation_config=self.generation_config,
            max_seq_len=self.max_seq_len,
            max_batch_size=max_batch_size,
            cache_bytes=cache_bytes,
            execution=self.execution,
        )
        other.default_eos_token_ids = self.default_eos_token_ids
        other.loop.weights_may_change = self.loop.weights_may_change
        return other

    @property
    def max_seq_len(self) -> int:
        return self.state.max_seq_len

    @property
    def max_batch_size(self) -> int:
        return self.state.num_sequences

    @property
    def dtype(self) -> str:
        """What the weights hold: "bf16", or the formats of a GGUF file, "q4_1+q8_0"."""
        return self.weights.formats

    @property
    def no_neurons(self) -> str | None:
        """Why single neurons of this model's weights cannot be left out, also where they are loaded for it; None: they
        can, with ``neuron_rows``."""
        return self.weights.no_neurons()

    @staticmethod
    def no_neurons_of(model: str | Path, dtype: str | torch.dtype | None = None) -> str | None:
        """``no_neurons`` of a checkpoint before it is loaded with ``dtype``; reads its configuration and headers."""
        return no_neurons_of_experts(blocks_of_experts(model, dtype))

    def executor_for(self, policy: Policy) -> Executor:
        """The executor of the program that ``policy`` needs: dense, with gates, or with instructions that leave neurons
        out.

        Raises:
            PolicyError: it is no policy, or one that is impossible on this model as it was loaded.
        """
        return self._variants[Variant.for_plans([self.plan_of(policy)])]

    def compare_with_reference(self, policy: Policy) -> ComparingExecutor:
        """From now on, each instruction of the steps that ``policy`` needs is run by the reference too. The result
        gathers the differences. For debugging: it is slow, and cannot be taken back."""
        variant = Variant.for_plans([self.plan_of(policy)])
        self._variants[variant] = comparing = ComparingExecutor(self._variants[variant], self.state)
        return comparing

    def plan_of(self, policy: Policy) -> GatePlan | None:
        """What ``Handle.set_plan`` takes: the policy as the gate reads it; None: nothing is skipped."""
        if not isinstance(policy, Policy):
            raise PolicyError(f"a policy is wanted, got a {type(policy).__name__}; load_policy reads one from a file")
        plan = policy.plan(self.config.num_hidden_layers)
        if plan is not None and plan.neurons is not None:
            if not self.weights.neuron_rows:
                raise PolicyError(self.no_neurons or NO_NEURON_ROWS)
            plan.neurons.check_neurons(self.config.scaled_neurons, self.state.neuron_shares.tolist())
        return plan

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
        decoding = self.begin(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            eos_token_ids=eos_token_ids,
            policy=policy,
        )
        try:
            return decoding.results()
        finally:
            decoding.end()

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
        yield from self.submit(
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            eos_token_ids=eos_token_ids,
            policy=policy,
        )

    def submit(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        eos_token_ids: Sequence[int] | int | None = None,
        policy: Policy | None = None,
        deadline: float = math.inf,
    ) -> Handle:
        """Queues one prompt and returns at once; arguments as in ``generate``. The handle gives its chunks as they come
        (iterate), the whole answer (``result()``), and ends it (``cancel()``). Of prompts that wait for their turn in a
        step, the one with the earliest ``deadline`` comes first; any clock will do.

        Raises:
            RequestError: nothing was queued; the message says what to change.
        """
        decoding = self.begin(
            [single_prompt(prompt)],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            eos_token_ids=eos_token_ids,
            policy=policy,
            deadline=deadline,
        )
        return decoding.rows[0]

    def step(self) -> bool:
        """Runs one step for every request in flight; returns whether there is more to do. Waiting for a handle does
        this by itself."""
        return self.loop.step(1)

    def close(self) -> None:
        """Cancels all requests in flight; nothing can be submitted from then on."""
        self.loop.close()

    def begin(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        stop: Sequence[str] = (),
        eos_token_ids: Sequence[int] | int | None = None,
        policy: Policy | None = None,
        deadline: float = math.inf,
    ) -> Decoding:
        """Checks a whole request, then submits its prompts together; none is when a check fails.

        The lower half of ``generate`` and ``stream``, for callers with a loop of their own. Arguments as there.
        """
        listed = listed_prompts(prompts)
        if not listed:
            raise RequestError("no prompt was given")
        if len(listed) > self.max_batch_size:
            raise RequestError(
                f"{len(listed)} prompts do not fit max_batch_size={self.max_batch_size}; "
                "split them or load the engine with a larger one"
            )
        stop = checked_stop(stop)
        if stop:
            self._require_tokenizer("a stop string")
        if sampling is None:
            sampling = default_sampling(self.generation_config)
        if isinstance(sampling, SamplingParams):
            sampling = [sampling] * len(listed)
        if not isinstance(sampling, Sequence) or not all(isinstance(one, SamplingParams) for one in sampling):
            raise RequestError(f"sampling must be SamplingParams, or a list of them, got {sampling!r}")
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
        for param in sampling:
            self._check_bias(param)
        plan = self.plan_of(self.policy if policy is None else policy)
        requests = [
            Request(
                token_ids=tuple(tokens),
                plan=plan,
                sampling=replace(param, top_k=min(param.top_k, self.config.vocab_size)),
                stop=tuple(stop),
                eos_token_ids=tuple(eos),
                max_new_tokens=max_new_tokens,
                embedded=given,
                deadline=deadline,
            )
            for tokens, param, given in zip(token_ids, sampling, embedded, strict=True)
        ]
        return Decoding(self.loop, self.loop.submit_all(requests))

    def _check_bias(self, sampling: SamplingParams) -> None:
        for token, _ in sampling.logit_bias:
            if not 0 <= token < self.config.vocab_size:
                message = f"logit_bias: token {token} is outside the vocabulary of {self.config.vocab_size}"
                raise RequestError(message, param="logit_bias")

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


@dataclass(frozen=True)
class _Wanted:
    """What was asked of a model that is to be loaded."""

    device: str
    dtype: torch.dtype | None
    recipe: str | None  # what matrices are quantised to, in place of a dtype
    max_seq_len: int | None
    policy: Policy | None
    neuron_rows: bool | None

    def lies_for_neurons(self, config: ModelConfig) -> bool:
        plan = self.policy.plan(config.num_hidden_layers) if isinstance(self.policy, Policy) else None
        return plan is not None and plan.neurons is not None if self.neuron_rows is None else self.neuron_rows

    def check(self, config: ModelConfig, dtype: torch.dtype) -> tuple[torch.dtype, int]:
        """The dtype and the length; everything that can be refused is, before a byte of weights is read."""
        length = self.max_seq_len if self.max_seq_len is not None else min(config.reach, DEFAULT_MAX_SEQ_LEN)
        config.check_length(length)
        plan = self.policy.plan(config.num_hidden_layers) if self.policy is not None else None
        if plan is not None and plan.neurons is not None:
            plan.neurons.check_neurons(config.scaled_neurons)
        check_memory(config, dtype, length, self.device)
        return dtype, length


@dataclass(frozen=True)
class _Loaded:
    config: ModelConfig
    weights: ModelWeights
    tokenizer: PreTrainedTokenizerBase | None
    generation_config: GenerationConfig | None
    max_seq_len: int


def _from_checkpoint(model: str | Path, wanted: _Wanted, tokenizer: PreTrainedTokenizerBase | None) -> _Loaded:
    folder = resolve_checkpoint(model)
    if folder.is_file():
        return _from_gguf(GgufFile(folder), wanted, tokenizer)
    whole = load_config(folder)
    hf_config = whole.get_text_config(decoder=True)  # of a multimodal model
    config = ModelConfig.from_hf(hf_config)  # an unknown family is named before its weights are looked for
    shards = Shards(folder)
    config = replace(config, tie_word_embeddings=bool(whole.tie_word_embeddings))
    config = replace(config, tie_word_embeddings=shards.head_is_tied(config))
    dtype, length = wanted.check(config, wanted.dtype or resolve_dtype(hf_config.dtype or whole.dtype or "fp32"))
    settings = quantization_of(whole)
    if settings is None and wanted.recipe is None and not stacks_experts(config):
        weights = load_checkpoint(shards, config, dtype, length, wanted.device, wanted.lies_for_neurons(config))
    else:
        parameters = shard_parameters(shards, config, settings, expected_tensors(config))
        weights = _as_wanted(parameters, config, wanted if settings else replace(wanted, dtype=dtype), length)
    fill_rope(weights, hf_config, None)
    tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
    return _Loaded(config, weights, tokenizer, load_generation_config(folder), length)


def _from_gguf(file: GgufFile, wanted: _Wanted, tokenizer: PreTrainedTokenizerBase | None) -> _Loaded:
    hf_config = gguf_config.hf_config(file)
    config = ModelConfig.from_hf(hf_config)
    tensors = GgufTensors(file, config, expected_tensors(config))
    _, length = wanted.check(config, wanted.dtype or torch.bfloat16)
    weights = _as_wanted(tensors, config, wanted, length)
    fill_rope(weights, hf_config, frequency_factors=tensors.rope_factors())
    tokenizer = load_gguf_tokenizer(file) if tokenizer is None else tokenizer
    return _Loaded(config, weights, tokenizer, gguf_config.generation_config(file), length)


def _is_module(model: object) -> bool:
    if not isinstance(model, torch.nn.Module):
        return False  # without the import, which takes seconds
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _from_module(module: PreTrainedModel, wanted: _Wanted, tokenizer: PreTrainedTokenizerBase | None) -> _Loaded:
    hf_config = module.config.get_text_config()
    config = replace(ModelConfig.from_hf(hf_config), tie_word_embeddings=shares_embeddings(module))
    dtype, length = wanted.check(config, wanted.dtype or module.dtype)
    if wanted.recipe is not None:
        given = check_module(module, config, expected_parameters(config), wanted.device)
        saved = {own: tensor for name in given for own, tensor in as_saved(config, name, given[name].detach()).items()}
        read = FloatParameters(type(module).__name__, config, saved.__getitem__)
        weights = _quantised(read, config, wanted, length)
    else:
        weights = pack_module(module, config, dtype, length, wanted.device, wanted.lies_for_neurons(config))
    fill_rope(weights, hf_config, module)
    return _Loaded(config, weights, tokenizer, module.generation_config, length)


def _as_wanted(parameters: Parameters, config: ModelConfig, wanted: _Wanted, length: int) -> ModelWeights:
    """Weights of a checkpoint in formats of its own: in those, in others, or as floats."""
    neuron_rows = wanted.lies_for_neurons(config)
    if wanted.recipe is not None:
        return _quantised(parameters, config, wanted, length)
    if wanted.dtype is not None:
        return load_as_floats(parameters, config, wanted.dtype, length, wanted.device, neuron_rows)
    return load_in_formats(parameters, config, length, wanted.device, neuron_rows)


def _quantised(parameters: Parameters, config: ModelConfig, wanted: _Wanted, length: int) -> ModelWeights:
    """Weights in the formats of the recipe that is wanted."""
    shapes = expected_tensors(config)
    formats = matrix_formats(config, shapes, str(wanted.recipe))
    quantised = QuantizedParameters(parameters, formats, shapes)
    return load_in_formats(quantised, config, length, wanted.device, wanted.lies_for_neurons(config))


def _check_batch_size(max_batch_size: int) -> None:
    if max_batch_size < 1:
        raise RequestError(f"max_batch_size must be at least 1, got {max_batch_size}")
