"""Qwen2.5-Omni's processor for images and sounds."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5OmniProcessor
from transformers.processing_utils import ProcessorMixin

_TOKENS = ("image", "audio", "video", "vision_bos", "vision_eos", "audio_bos", "audio_eos")


class ImageAudioProcessor(Qwen2_5OmniProcessor):
    """The original processor without videos, which need torchvision. ``from_pretrained`` reads the same files."""

    def __init__(
        self,
        image_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
    ) -> None:
        ProcessorMixin.__init__(self, image_processor, feature_extractor, tokenizer, chat_template=chat_template)
        self.video_processor = image_processor  # some releases read its merge size, even without videos
        for name in _TOKENS:
            setattr(self, f"{name}_token", getattr(tokenizer, f"{name}_token"))
        for name in _TOKENS[:3]:
            setattr(self, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
