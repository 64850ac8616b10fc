"""Chats become prompts and tensors; what a multimodal model cannot answer is refused before it waits."""

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.chat.chat import Audio, Chat, Message, Part, modality_of
from skipkernels.chat.multimodal.encoders import Encoders
from skipkernels.chat.multimodal.families import family_of
from skipkernels.chat.multimodal.multimodal_format import MultimodalFormat
from skipkernels.chat.text_format import work_of
from skipkernels.errors import RequestError
from skipkernels.server.http.limits import RequestLimits
from skipkernels.server.http.parts import PartDecoder
from tests.chat.multimodal.chats import RATE_HZ, chat_of, picture, recording, stock_inputs
from tests.multimodal import MULTIMODAL, tiny_multimodal
from tests.server.http.media import base64_of, image_file, wav_file

MODULES = {family: tiny_multimodal(family) for family in MULTIMODAL}
ENCODERS = {family: Encoders(tiny_multimodal(family)[0]) for family in MULTIMODAL}
families = pytest.mark.parametrize("family", MULTIMODAL)


def format_of(family: str, max_seq_len: int = 256) -> MultimodalFormat:
    module, processor = MODULES[family]
    modalities = ("text", *family_of(module.config.model_type).modalities)
    return MultimodalFormat(processor, modalities, max_seq_len, prefill_share=0.25)


def asked(*parts: Any, **fields: Any) -> Chat:
    return Chat((Message("user", parts),), **fields)


@families
def test_every_subset_has_the_prompt_of_a_chat_without_the_rest(family: str) -> None:
    chat_format = format_of(family)
    inputs = chat_format.request(chat_of(chat_format.modalities)).inputs
    for subset, token_ids in inputs["text"].token_ids.items():
        expected = stock_inputs(MODULES[family][1], chat_of(subset))
        assert list(token_ids) == expected["input_ids"][0].tolist()
        tensors = {
            name: tensor for modality in subset if modality != "text" for name, tensor in inputs[modality].items()
        }
        assert tensors.keys() | {"input_ids", "attention_mask"} == expected.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), name


@families
def test_a_chat_may_hold_less_than_the_model_takes(family: str) -> None:
    chat_format = format_of(family)
    for modality in chat_format.modalities:
        request = chat_format.request(chat_of({"text", modality}))
        assert request.modalities == {"text", modality}
        assert set(request.inputs["text"].token_ids) == {("text",), tuple(sorted({"text", modality}))}


def test_recordings_come_at_any_rate() -> None:
    """A tone stays that tone: the spectrogram of a recording at another rate is nearly the same."""
    chat_format = format_of("qwen2 audio")
    spectrograms = []
    for rate_hz in (RATE_HZ, 11025, 44100):
        time_s = np.arange(rate_hz) / rate_hz
        tone = Audio(np.sin(2 * np.pi * 700 * time_s).astype(np.float32), rate_hz)
        spectrograms.append(chat_format.request(asked("What is it?", tone)).inputs["audio"]["input_features"])
    for other in spectrograms[1:]:
        assert other.shape == spectrograms[0].shape
        assert int((other.mean(-1).argmax() - spectrograms[0].mean(-1).argmax()).abs()) == 0
        assert float((other - spectrograms[0]).abs().mean()) < 0.1 * float(spectrograms[0].std())


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_files_go_all_the_way(kind: str) -> None:
    """Bytes as clients send them, decoded, through the processor and the encoders."""
    decoder = PartDecoder(RequestLimits())
    image = decoder.image(f"data:image/{kind.lower()};base64,{base64_of(image_file(31, 17, kind))}", "image")
    audio = decoder.audio(base64_of(wav_file(0.4, 8000, channels=2)), "audio")
    inputs = format_of("qwen2.5 omni").request(asked("Describe ", image, audio)).inputs
    module, _ = tiny_multimodal("qwen2.5 omni")
    kept = ("audio", "image", "text")
    prompt = Encoders(module)(inputs["text"].token_ids[kept], [inputs["audio"], inputs["image"]])
    assert prompt.embeddings.shape == (len(inputs["text"].token_ids[kept]), 40)
    assert prompt.embeddings.isfinite().all()


def test_room_and_work_are_those_of_the_whole_chat() -> None:
    chat_format = format_of("llava")
    request = chat_format.request(chat_of({"text", "image"}, max_new_tokens=20))
    tokens = len(request.inputs["text"].token_ids[("image", "text")])
    assert request.work == work_of(tokens, 20, 0.25)
    exact = format_of("llava", max_seq_len=tokens + 19)
    assert exact.request(chat_of({"text", "image"}, max_new_tokens=20)).inputs["text"].max_new_tokens == 20
    assert exact.request(chat_of({"text", "image"}, max_new_tokens=21)).inputs["text"].max_new_tokens == 20
    with pytest.raises(RequestError, match=f"the prompt has {tokens} tokens, this model takes {tokens - 1}; shorten"):
        format_of("llava", max_seq_len=tokens - 1).request(chat_of({"text", "image"}, max_new_tokens=1))


@pytest.mark.parametrize(
    ("family", "parts", "message"),
    [
        ("llava", (picture(),), "the messages hold no text"),
        ("llava", (" ", picture()), "the messages hold no text"),
        ("llava", ("Hear ", recording()), "this model does not take audio; it takes text, image"),
        ("qwen2 audio", ("See ", picture()), "this model does not take image; it takes text, audio"),
        (
            "llava",
            ("a <|IMAGE|> b",),
            r"the text contains '<\|IMAGE\|>', which this model reserves for images or audio; remove it",
        ),
        ("qwen2.5 omni", ("<|audio_bos|>",), r"the text contains '<\|audio_bos\|>'"),
        ("qwen2.5 omni", ("Long ", recording(1.01)), r"lasts 1\.01 s, this model hears 0\.1 to 1 s; cut it to that"),
        ("qwen2 audio", ("Short ", recording(0.09)), r"lasts 0\.09 s"),
        ("llava", ("Thin ", picture(1, 201)), "1 x 201 pixels is too long and thin"),
        ("qwen2.5 omni", ("Thin ", picture(402, 2)), "402 x 2 pixels is too long and thin"),
    ],
)
def test_what_a_model_cannot_answer_is_refused(family: str, parts: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        format_of(family).request(asked(*parts))


def test_what_a_template_refuses_is_the_callers_mistake() -> None:
    _, processor = tiny_multimodal("llava")
    processor.chat_template = "{{ raise_exception('nobody has asked') }}"
    chat_format = MultimodalFormat(processor, ("text", "image"), 256, prefill_share=0.25)
    with pytest.raises(RequestError, match="this model's processor refuses this chat: nobody has asked"):
        chat_format.request(asked("Hello"))


def test_a_format_travels_to_other_processes() -> None:
    chat_format = format_of("qwen2.5 omni")
    chat = chat_of(chat_format.modalities)
    there = pickle.loads(pickle.dumps(chat_format))
    request = pickle.loads(pickle.dumps(there.request(chat)))
    assert request.inputs["text"] == chat_format.request(chat).inputs["text"]


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1600, 16000), st.integers(0, 3))
def test_whatever_is_accepted_can_be_encoded(width: int, height: int, samples: int, seed: int) -> None:
    """A batch holds requests of several callers: one that fails in the model would take the others with it."""
    audio = dataclasses.replace(recording(seed=seed), samples=recording(1.0, seed).samples[:samples])
    for family in MULTIMODAL:
        chat_format, encoders = format_of(family, 1024), ENCODERS[family]
        parts: list[Part] = [picture(width, height, seed), audio]
        taken = [part for part in parts if modality_of(part) in chat_format.modalities]
        inputs = chat_format.request(asked("What is it?", *taken)).inputs
        for subset, token_ids in inputs["text"].token_ids.items():
            prompt = encoders(token_ids, [inputs[modality] for modality in subset if modality != "text"])
            assert prompt.embeddings.isfinite().all()
