"""The decode program behind ``model.generate`` of transformers.

    model.generate(**inputs, custom_generate=skipkernels.hf_generate, skip_policy=SkipPolicy(threshold=0.98))

transformers prepares inputs, logits processors and stopping criteria as always; the loop itself is ours.
"""

from __future__ import annotations

from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from skipkernels.decoding.decoding import Decoding
from skipkernels.decoding.generation import SamplingParams
from skipkernels.engine import DEFAULT_MAX_SEQ_LEN, Engine
from skipkernels.errors import RequestError
from skipkernels.model.weights import parameter_views
from skipkernels.skipping.policy import Policy

_engines: WeakKeyDictionary[PreTrainedModel, Engine] = WeakKeyDictionary()


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
    not doubled and the model stays usable as before. Sampling draws its seed from torch's generator:
    ``torch.manual_seed`` reproduces it.

    Args:
        skip_policy: which FFNs to skip; None is dense.
        skip_streamer: a streamer. transformers does not hand ``streamer=`` on to a callable, hence a name of our own.
        skip_threads: threads of the cpu executor; None: all processors.

    Returns:
        Token ids [batch, prompt + new tokens], padded on the right; a ``GenerateDecoderOnlyOutput`` with
        ``return_dict_in_generate``.

    Raises:
        RequestError: an option that the decode program does not have; nothing was generated.
    """
    if generation_config is None:
        raise RequestError("hf_generate is called by model.generate(custom_generate=...), not by itself")
    _refuse_unsupported(generation_config, model_kwargs)
    batch_size, prompt_length = input_ids.shape
    if skip_streamer is not None and batch_size > 1:
        raise RequestError(f"a streamer takes one sequence, got a batch of {batch_size}")
    criteria = stopping_criteria or StoppingCriteriaList()
    limit = model.config.max_position_embeddings
    max_length = min((c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)), default=limit)
    eos = sorted(
        {int(token) for c in criteria if isinstance(c, EosTokenCriteria) for token in c.eos_token_id.flatten()}
    )
    others = StoppingCriteriaList(c for c in criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria))
    pad = generation_config.pad_token_id
    if pad is None:
        pad = eos[0] if eos else 0

    engine = _engine_for(model, batch_size, max_length, skip_threads)
    decoding = engine.begin(
        _unpadded(input_ids, model_kwargs.get("attention_mask")),
        max_new_tokens=max_length - prompt_length,
        sampling=_sampling(generation_config, logits_processor or LogitsProcessorList(), batch_size),
        eos_token_ids=eos,
        policy=skip_policy,
    )
    if skip_streamer is not None:
        skip_streamer.put(input_ids.cpu())
    if others or skip_streamer is not None:  # somebody wants to see every token
        for _ in decoding.steps():
            if skip_streamer is not None:
                skip_streamer.put(torch.tensor(decoding.rows[0].token_ids[-1:]))
            if others:
                _apply(others, decoding, _sequences(input_ids, decoding, pad))
    else:
        decoding.step(max_length)
    if skip_streamer is not None:
        skip_streamer.end()
    sequences = _sequences(input_ids, decoding, pad)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, sequences))
    return sequences


def _refuse_unsupported(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Options that would be ignored are errors."""
    if (config.num_beams or 1) > 1:
        raise RequestError(f"num_beams={config.num_beams} is not supported; the decode program has no beam search")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            raise RequestError(f"{name}=True is not supported; the decode program does not keep them")
    if model_kwargs.get("inputs_embeds") is not None:
        raise RequestError("inputs_embeds is not supported; pass input_ids")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise RequestError("past_key_values with cached tokens is not supported; pass the whole prompt as input_ids")


def _sampling(config: GenerationConfig, processors: LogitsProcessorList, batch_size: int) -> list[SamplingParams]:
    """What transformers' processors would do, for each row; each row has a seed of its own."""
    values: dict[str, Any] = {}
    for processor in processors:
        if isinstance(processor, RepetitionPenaltyLogitsProcessor):
            values["repetition_penalty"] = float(processor.penalty)
        elif isinstance(processor, TemperatureLogitsWarper):
            values["temperature"] = float(processor.temperature)
        elif isinstance(processor, TopKLogitsWarper):
            values["top_k"] = int(processor.top_k)
        elif isinstance(processor, TopPLogitsWarper):
            values["top_p"] = float(processor.top_p)
        elif isinstance(processor, MinPLogitsWarper):
            values["min_p"] = float(processor.min_p)
        else:
            raise RequestError(
                f"logits processor {type(processor).__name__} is not supported; supported are temperature, top_k, "
                "top_p, min_p and repetition_penalty"
            )
    if not config.do_sample:
        return [SamplingParams(repetition_penalty=values.get("repetition_penalty", 1.0))] * batch_size
    values.setdefault("temperature", 1.0)
    return [SamplingParams(seed=seed, **values) for seed in torch.randint(1 << 62, (batch_size,)).tolist()]


def _unpadded(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    """Each row's tokens of input_ids [batch, tokens], without its padding on the left."""
    if mask is None:
        return input_ids.tolist()
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise RequestError("padding must stand on the left; set tokenizer.padding_side='left'")
    return [ids[keep.bool()].tolist() for ids, keep in zip(input_ids, mask, strict=True)]


def _sequences(input_ids: torch.Tensor, decoding: Decoding, pad: int) -> torch.Tensor:
    """Prompts and what was generated so far [batch, tokens], padded on the right."""
    generated = [torch.tensor(row.token_ids, dtype=input_ids.dtype) for row in decoding.rows]
    new = torch.nn.utils.rnn.pad_sequence(generated, batch_first=True, padding_value=pad)
    return torch.cat((input_ids, new), dim=1)


def _apply(criteria: StoppingCriteriaList, decoding: Decoding, sequences: torch.Tensor) -> None:
    """Ends the rows that one of the user's stopping criteria wants ended."""
    done = criteria(cast(torch.LongTensor, sequences), cast(torch.FloatTensor, torch.empty(0)))
    for row, row_done in zip(decoding.rows, done.tolist(), strict=True):
        if row_done:
            row.end()


def _engine_for(model: PreTrainedModel, batch_size: int, max_length: int, num_threads: int | None) -> Engine:
    """The module's engine: built at its first use, and again when it is too small or the module has changed."""
    engine = _engines.get(model)
    if engine is not None and engine.execution.num_threads == num_threads and _is_current(engine, model):
        if engine.max_batch_size >= batch_size and engine.max_seq_len >= max_length:
            return engine
        batch_size, max_length = max(batch_size, engine.max_batch_size), max(max_length, engine.max_seq_len)
    engine = _engines[model] = Engine.from_pretrained(
        model,
        max_seq_len=max(max_length, min(DEFAULT_MAX_SEQ_LEN, model.config.max_position_embeddings)),
        max_batch_size=batch_size,
        device=str(model.device),
        num_threads=num_threads,
    )
    return engine


def _is_current(engine: Engine, model: PreTrainedModel) -> bool:
    """Whether the engine still decodes with the module's own values: matrices are shared, norms and biases copies."""
    parameters = dict(model.named_parameters())
    return all(
        parameters[name].data_ptr() == view.data_ptr()
        if view.dim() == 2
        else torch.equal(parameters[name].float(), view)
        for name, view in parameter_views(engine.config, engine.weights).items()
    )
