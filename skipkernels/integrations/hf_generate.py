"""The decode program behind ``model.generate`` of transformers.

    model.generate(**inputs, custom_generate=skipkernels.hf_generate, skip_policy=SkipPolicy(threshold=0.98))

transformers prepares inputs, logits processors and stopping criteria as always; the loop itself is ours.
"""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from transformers import (
    GenerationConfig,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from skipkernels.decoding.decoding import Decoding
from skipkernels.decoding.generation import SamplingParams
from skipkernels.engine import DEFAULT_MAX_SEQ_LEN, Engine
from skipkernels.errors import ModelError, RequestError
from skipkernels.model.config import ModelConfig
from skipkernels.model.module_check import check_module, shares_embeddings
from skipkernels.model.rope import rope_tables
from skipkernels.model.weights import as_packed, expected_parameters, parameter_views
from skipkernels.skipping.policy import Policy
from skipkernels.support.turns import Turns

_engines: WeakKeyDictionary[PreTrainedModel, Engine] = WeakKeyDictionary()
_turns: WeakKeyDictionary[PreTrainedModel, Turns] = WeakKeyDictionary()
_turns_lock = threading.Lock()


class Streamer(Protocol):
    """What transformers' streamers offer."""

    def put(self, value: torch.Tensor) -> None: ...
    def end(self) -> None: ...


def hf_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    skip_policy: Policy | None = None,
    skip_streamer: Streamer | None = None,
    skip_threads: int | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Decodes for ``model.generate(custom_generate=hf_generate)``.

    The first call packs the model's q/k/v and gate/up matrices; its parameters become views of them, so memory is
    not doubled and the model stays usable as before. Later calls follow changes of the module's values and refuse
    others. Threads that share a module take turns. Sampling draws its seed from torch's generator:
    ``torch.manual_seed`` reproduces it.

    Args:
        skip_policy: which FFNs to skip; None is dense.
        skip_streamer: a streamer. transformers does not hand ``streamer=`` on to a callable, hence a name of our own;
            a streamer given there gets the prompt and nothing else.
        skip_threads: threads of the cpu executor; None: all processors.

    Returns:
        Token ids [batch, prompt + new tokens], padded on the right; a ``GenerateDecoderOnlyOutput`` with
        ``return_dict_in_generate``.

    Raises:
        RequestError: an option that the decode program does not have; nothing was generated.
        ModelError: the module computes something else than its configuration says.
    """
    if generation_config is None:
        raise RequestError("hf_generate is called by model.generate(custom_generate=...), not by itself")
    _refuse_unsupported(generation_config, model_kwargs, input_ids)
    batch_size, prompt_length = input_ids.shape
    if skip_streamer is not None and batch_size > 1:
        raise RequestError(f"a streamer takes one sequence, got a batch of {batch_size}")
    criteria = stopping_criteria or StoppingCriteriaList()
    limit = model.config.get_text_config().max_position_embeddings
    max_length = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=limit)
    eos = sorted({int(token) for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.flatten()})
    others = StoppingCriteriaList(c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria))
    pads = any(hasattr(c, "eos_token_id") for c in criteria)
    pad = generation_config.pad_token_id
    if pad is None:
        pad = eos[0] if eos else 0
    prompts = _unpadded(input_ids, model_kwargs.get("attention_mask"))
    padding = torch.tensor([prompt_length - len(prompt) for prompt in prompts])
    sampling = _sampling(generation_config, logits_processor or LogitsProcessorList(), padding)

    with _turns_of(model).take():
        engine = _engine_for(model, batch_size, max_length, skip_threads)
        decoding = engine.begin(
            prompts,
            max_new_tokens=max_length - prompt_length,
            sampling=sampling,
            eos_token_ids=eos,
            policy=skip_policy,
        )
        try:
            if skip_streamer is not None:
                skip_streamer.put(input_ids.cpu())
            if others or skip_streamer is not None:  # somebody wants to see every token
                done, sent = torch.zeros(batch_size, dtype=torch.bool), 0
                for _ in decoding.steps():
                    if skip_streamer is not None:
                        for token in decoding.rows[0].token_ids[sent:]:  # a device may be some tokens ahead
                            skip_streamer.put(torch.tensor([token]))
                            sent += 1
                    if others:
                        sequences = _sequences(input_ids, decoding, pad)
                        done |= others(cast(torch.LongTensor, sequences), cast(torch.FloatTensor, None)).cpu()
                        _end(decoding, done, together=not pads)
            else:
                decoding.step(max_length)
            if skip_streamer is not None:
                skip_streamer.end()
        finally:
            decoding.end()
        sequences = _sequences(input_ids, decoding, pad)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, sequences))
    return sequences


_MODEL_KWARGS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
"""What reaches the loop beside the ids and changes nothing, or is checked."""


def _refuse_unsupported(config: GenerationConfig, model_kwargs: dict[str, Any], input_ids: torch.Tensor) -> None:
    """Options that would be ignored are errors."""
    if (config.num_beams or 1) > 1:
        raise RequestError(f"num_beams={config.num_beams} is not supported; the decode program has no beam search")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "token_healing"):
        if getattr(config, name, False):
            raise RequestError(f"{name}=True is not supported; the decode program does not keep them")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        asked = [name for name in _MODE_OPTIONS if getattr(config, name, None)]
        raise RequestError(f"{mode.value} is not supported; leave out {', '.join(asked) or 'what asks for it'}")
    if config.cache_implementation == "quantized":
        raise RequestError("cache_implementation='quantized' is not supported; the cache has the weights' dtype")
    if model_kwargs.get("inputs_embeds") is not None:
        raise RequestError("inputs_embeds is not supported; pass input_ids")
    for name, value in model_kwargs.items():
        if value is not None and name not in _MODEL_KWARGS:
            raise RequestError(f"{name} is not supported; the decode program would ignore it")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise RequestError("past_key_values with cached tokens is not supported; pass the whole prompt as input_ids")
    if cache is not None and getattr(cache, "_is_user_defined", False):
        raise RequestError("past_key_values is not supported; the decode program would not fill it")
    _check_positions(model_kwargs.get("position_ids"), model_kwargs.get("attention_mask"), input_ids)


_MODE_OPTIONS = (
    "penalty_alpha",
    "dola_layers",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "constraints",
    "force_words_ids",
)


def _check_positions(positions: torch.Tensor | None, mask: torch.Tensor | None, input_ids: torch.Tensor) -> None:
    """The decode program counts positions from the first token that is no padding."""
    if positions is None:
        return
    kept = torch.ones_like(input_ids) if mask is None else mask.long()
    counted = kept.cumsum(-1) - 1
    if positions.dim() != 2 or positions.shape[1] != kept.shape[1] or len(positions) not in (1, len(kept)):
        raise RequestError(f"position_ids of shape {tuple(positions.shape)} are not supported; leave them out")
    if bool(((positions.to(counted.device) != counted) & (kept != 0)).any()):
        raise RequestError("position_ids must count 0, 1, 2 and so on from the first token; leave them out")


_PROCESSORS: dict[type, tuple[str, type]] = {
    RepetitionPenaltyLogitsProcessor: ("repetition_penalty", float),
    TemperatureLogitsWarper: ("temperature", float),
    TopKLogitsWarper: ("top_k", int),
    TopPLogitsWarper: ("top_p", float),
    MinPLogitsWarper: ("min_p", float),
}
"""The processors that the decode program has, in its order, and their parameters."""


def _sampling(config: GenerationConfig, processors: LogitsProcessorList, padding: torch.Tensor) -> list[SamplingParams]:
    """What transformers' processors would do, for each row of ``padding`` tokens; each row has a seed of its own."""
    values: dict[str, Any] = {}
    order = list(_PROCESSORS)
    last = -1
    for processor in processors:
        if type(processor) is LogitNormalization:  # changes neither the greatest logit nor the distribution
            continue
        if type(processor) not in _PROCESSORS:
            raise RequestError(
                f"logits processor {type(processor).__name__} is not supported; supported are temperature, top_k, "
                "top_p, min_p and repetition_penalty"
            )
        name, kind = _PROCESSORS[type(processor)]
        if order.index(type(processor)) <= last:
            raise RequestError(f"{name} stands behind {order[last].__name__} or is given twice; their order is fixed")
        last = order.index(type(processor))
        _refuse_variant(processor, name, padding)
        values[name] = kind(getattr(processor, name if name != "repetition_penalty" else "penalty"))
    batch_size = len(padding)
    if not config.do_sample:
        return [SamplingParams(repetition_penalty=values.get("repetition_penalty", 1.0))] * batch_size
    values.setdefault("temperature", 1.0)
    return [SamplingParams(seed=seed, **values) for seed in torch.randint(1 << 62, (batch_size,)).tolist()]


def _refuse_variant(processor: object, name: str, padding: torch.Tensor) -> None:
    """Settings of a known processor that the decode program does not have."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if ignored is not None and not bool((torch.as_tensor(ignored).cpu() == padding).all()):
        raise RequestError(f"{name} with prompt_ignore_length is not supported")
    if getattr(processor, "filter_value", -math.inf) != -math.inf:
        raise RequestError(f"{name} with a filter_value of its own is not supported")
    if getattr(processor, "min_tokens_to_keep", 1) != 1:
        raise RequestError(f"{name} with min_tokens_to_keep is not supported")


def _unpadded(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    """Each row's tokens of input_ids [batch, tokens], without its padding on the left."""
    if mask is None:
        return input_ids.tolist()
    if mask.shape != input_ids.shape:
        raise RequestError(f"attention_mask has shape {tuple(mask.shape)}, expected {tuple(input_ids.shape)}")
    kept = mask.bool()
    if not bool((mask == kept).all()):
        raise RequestError("attention_mask must hold zeros and ones only")
    if bool((kept[:, 1:] < kept[:, :-1]).any()) or not bool(kept[:, -1:].all()):
        raise RequestError("padding must stand on the left; set tokenizer.padding_side='left'")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, kept, strict=True)]


def _sequences(input_ids: torch.Tensor, decoding: Decoding, pad: int) -> torch.Tensor:
    """Prompts and what was generated so far [batch, tokens], padded on the right."""
    generated = [torch.tensor(row.token_ids, dtype=input_ids.dtype) for row in decoding.rows]
    new = torch.nn.utils.rnn.pad_sequence(generated, batch_first=True, padding_value=pad)
    return torch.cat((input_ids, new), dim=1)


def _end(decoding: Decoding, done: torch.Tensor, *, together: bool) -> None:
    """Ends the rows that a stopping criterion wants ended; where no token pads, only when that is all of them, since
    transformers goes on with them until then."""
    if together and not bool(done.all()):
        return
    for row, row_done in zip(decoding.rows, done.tolist(), strict=True):
        if row_done and row.running:
            row.stop(ended_ok=True)


def _turns_of(model: PreTrainedModel) -> Turns:
    with _turns_lock:
        return _turns.setdefault(model, Turns(on_gpu=model.device.type == "cuda"))


def _engine_for(model: PreTrainedModel, batch_size: int, max_length: int, num_threads: int | None) -> Engine:
    """The module's engine: built at its first use, and again when it is too small or the module has changed."""
    if model.device.type == "meta":
        raise ModelError(
            f"the {type(model).__name__} is on the meta device and holds no values; load its weights first"
        )
    engine = _engines.get(model)
    if engine is not None and engine.execution.num_threads == num_threads and _is_current(engine, model):
        if engine.max_batch_size >= batch_size and engine.max_seq_len >= max_length:
            return engine
        batch_size, max_length = max(batch_size, engine.max_batch_size), max(max_length, engine.max_seq_len)
    text_config = model.config.get_text_config()
    usual = min(DEFAULT_MAX_SEQ_LEN, text_config.max_position_embeddings, ModelConfig.from_hf(text_config).reach)
    engine = _engines[model] = Engine.from_pretrained(
        model,
        max_seq_len=max(max_length, usual),
        max_batch_size=batch_size,
        device=str(model.device),
        num_threads=num_threads,
    )
    return engine


def _is_current(engine: Engine, model: PreTrainedModel) -> bool:
    """Whether the engine still decodes with the module's own values: matrices are shared, norms and biases copies.

    Raises:
        ModelError: the module has become one that the decode program does not compute.
    """
    hf_config = model.config.get_text_config()
    config = replace(ModelConfig.from_hf(hf_config), tie_word_embeddings=shares_embeddings(model))
    parameters = check_module(model, config, expected_parameters(config), model.device)
    if config != engine.config:
        return False
    weights = engine.weights
    (cos, sin), *_ = rope_tables(hf_config, 2, model)
    return (
        torch.equal(cos, weights.rope_cos[:2].cpu())
        and torch.equal(sin, weights.rope_sin[:2].cpu())
        and all(
            parameters[name].data_ptr() == view.data_ptr()
            if view.dim() >= 2 and view.shape == parameters[name].shape
            else torch.equal(as_packed(config, name, parameters[name]).to(view.dtype), view)
            for name, view in parameter_views(engine.config, weights).items()
        )
    )
