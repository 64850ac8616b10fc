"""A chat with everything in it, and the same as transformers takes it."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage
from transformers import PreTrainedModel, ProcessorMixin

from skipkernels.chat.chat import Audio, Chat, Image, Message, modality_of

RATE_HZ = 16000


def picture(width: int = 56, height: int = 40, seed: int = 0) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def recording(seconds: float = 0.6, seed: int = 0, rate_hz: int = RATE_HZ) -> Audio:
    samples = np.random.default_rng(seed).normal(0.0, 0.1, round(seconds * rate_hz))
    return Audio(samples.astype(np.float32), rate_hz)


def chat_of(modalities: Collection[str], seed: int = 0, max_new_tokens: int = 16) -> Chat:
    """Text in three places, and in between an image, a recording, and in an earlier turn one more of each."""
    image, audio = picture(seed=seed), recording(seed=seed)
    small, short = picture(24, 32, seed + 1), recording(0.25, seed + 1)
    turns: list[tuple[Any, tuple[Any, ...]]] = [
        ("user", (f"First {seed} ", small, short, "this?")),
        ("assistant", ("Yes.",)),
        ("user", ("And ", image, " here ", audio, " now?")),
    ]
    messages = [
        Message(role, tuple(part for part in parts if modality_of(part) in modalities)) for role, parts in turns
    ]
    return Chat(tuple(messages), max_new_tokens=max_new_tokens)


def stock_inputs(processor: ProcessorMixin, chat: Chat) -> Any:
    """What the module's own processor makes of the chat."""
    messages = []
    for message in chat.messages:
        content: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, Image):
                content.append({"type": "image", "image": PillowImage.fromarray(part.pixels)})
            elif isinstance(part, Audio):
                content.append({"type": "audio", "audio": part.samples})
            else:
                content.append({"type": "text", "text": part})
        messages.append({"role": message.role, "content": content})
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@torch.inference_mode()
def stock_tokens(module: PreTrainedModel, processor: ProcessorMixin, chat: Chat) -> list[int]:
    """What transformers decodes greedily."""
    inputs = stock_inputs(processor, chat)
    output = module.generate(
        **inputs, max_new_tokens=chat.max_new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return output[0, inputs["input_ids"].shape[1] :].tolist()
