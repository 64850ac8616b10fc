"""Tiny multimodal models of every family that is served, with weights on which a mistake shows."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from skipkernels.chat.multimodal.omni_processor import ImageAudioProcessor
from tests.models import BOS, byte_tokenizer, randomise

# by the names that Qwen2.5-Omni's processor asks its tokenizer for
_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
_TEXT: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MEL_BINS = 16


def multimodal_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, <s>, </s>, and those of images, sounds and videos."""
    tokenizer = byte_tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        extra_special_tokens=_TOKENS,
    )


def _token_id(name: str) -> int:
    return int(multimodal_tokenizer().convert_tokens_to_ids(_TOKENS[name]))


def _sounds() -> WhisperFeatureExtractor:
    """Up to a second at 16 kHz."""
    return WhisperFeatureExtractor(feature_size=_MEL_BINS, chunk_length=1)


def _llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    config = LlavaConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 24,
            "patch_size": 8,
        },
        image_token_index=_token_id("image_token"),
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = LlavaProcessor(
        images,
        multimodal_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=_TOKENS["image_token"],
        chat_template=_TEMPLATE,
    )
    return LlavaForConditionalGeneration(config), processor


def _qwen2_audio() -> tuple[PreTrainedModel, ProcessorMixin]:
    config = Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **_TEXT},
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": _MEL_BINS,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "d_model": 32,
            "max_source_positions": 50,
        },
        audio_token_index=_token_id("audio_token"),
    )
    processor = Qwen2AudioProcessor(_sounds(), multimodal_tokenizer(), chat_template=_TEMPLATE)
    return Qwen2AudioForConditionalGeneration(config), processor


def omni_config() -> Qwen2_5OmniThinkerConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 2]}
    return Qwen2_5OmniThinkerConfig(
        text_config={"model_type": "qwen2_5_omni_text", **_TEXT, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "out_hidden_size": 40,
            "fullatt_block_indexes": [1],
        },
        audio_config={
            "num_mel_bins": _MEL_BINS,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "d_model": 32,
            "max_source_positions": 50,
            "n_window": 25,
            "output_dim": 40,
        },
        audio_token_index=_token_id("audio_token"),
        image_token_index=_token_id("image_token"),
        video_token_index=_token_id("video_token"),
        audio_start_token_id=_token_id("audio_bos_token"),
        audio_end_token_id=_token_id("audio_eos_token"),
        vision_start_token_id=_token_id("vision_bos_token"),
    )


def _omni() -> tuple[PreTrainedModel, ProcessorMixin]:
    images = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=8 * 8, max_pixels=48 * 48)
    processor = ImageAudioProcessor(images, _sounds(), multimodal_tokenizer(), chat_template=_TEMPLATE)
    return Qwen2_5OmniThinkerForConditionalGeneration(omni_config()), processor


MULTIMODAL: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "llava": _llava,
    "qwen2 audio": _qwen2_audio,
    "qwen2.5 omni": _omni,
}


_SEEDS = {"llava": 8, "qwen2 audio": 11, "qwen2.5 omni": 4}  # with these they do not repeat themselves much


def tiny_multimodal(
    family: str, *, dtype: torch.dtype = torch.float32, seed: int | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random module of transformers, and its processor."""
    module, processor = MULTIMODAL[family]()
    seed = _SEEDS[family] if seed is None else seed
    return randomise(module, seed).to(dtype).eval(), processor
