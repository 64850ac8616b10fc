"""Chats to profile on: read from a file, and refused with the line that is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipkernels.chat.chat import Chat, Image
from skipkernels.chat.text_format import PROFILED_NEW_TOKENS
from skipkernels.errors import RequestError
from skipkernels.modality.errors import ProfileError
from skipkernels.modality.job import Request
from skipkernels.server.http.limits import RequestLimits
from skipkernels.server.http.samples import read_chats, samples_of
from tests.server.http.fakes import EchoFormat
from tests.server.http.media import audio_part, image_part, text_part


def line(content: Any = "Say it.", **fields: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": content}], **fields})


def write(folder: Path, *lines: str) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_chats_are_those_of_clients(tmp_path: Path) -> None:
    path = write(tmp_path, line(), "", line([text_part("Look: "), image_part()]))
    plain, with_image = read_chats(path, RequestLimits())
    assert (plain.where, with_image.where) == (f"{path}, line 1", f"{path}, line 3")
    assert plain.expected is None
    assert plain.chat.max_new_tokens == PROFILED_NEW_TOKENS
    (message,) = with_image.chat.messages
    assert message.text == "Look: "
    assert isinstance(message.parts[1], Image)
    assert message.parts[1].pixels.dtype == np.uint8


def test_right_answers_are_kept(tmp_path: Path) -> None:
    parts = [text_part("Both: "), image_part(), audio_part()]
    chats = read_chats(write(tmp_path, line(parts, expected="yes"), line(parts, expected="")), RequestLimits())
    assert [sample.expected for sample in samples_of(chats, EchoFormat())] == ["yes", ""]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no chats"),
        (["", " "], "holds no chats"),
        ([line(), "{"], "line 2: Invalid JSON"),
        ([line(), "", "[]"], "line 3: "),
        (['{"messages": []}'], "line 1: messages: "),
        ([line(surprise=1)], "line 1: surprise: Extra inputs"),
        ([line(7)], r"line 1: messages\.0\.content: content must be"),
        ([line(expected=7)], "line 1: expected: "),
        ([line(expected="yes"), line()], "line 2: expected: has none, the first line has one"),
        ([line(), line(expected="yes")], "line 2: expected: has one, the first line has none"),
        (
            [line([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}])],
            r"line 1: messages\.0\.content\.0\.image_url\.url: the image is none of",
        ),
        ([line([image_part()] * 5)], "line 1: 5 parts in all messages; a request may have 4"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        read_chats(write(tmp_path, *lines), RequestLimits(max_parts=4))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none\.jsonl: cannot be read"):
        read_chats(tmp_path / "none.jsonl", RequestLimits())
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match=r"bytes\.jsonl: is not UTF-8 text"):
        read_chats(tmp_path / "bytes.jsonl", RequestLimits())


def test_a_chat_that_lacks_a_modality_is_named(tmp_path: Path) -> None:
    chats = read_chats(write(tmp_path, line([text_part("Look: "), image_part()])), RequestLimits())
    with pytest.raises(ProfileError, match=r"line 1: holds no audio; .* audio, image, text"):
        samples_of(chats, EchoFormat())


def test_a_chat_that_the_model_refuses_is_named(tmp_path: Path) -> None:
    class Refusing(EchoFormat):
        def request(self, chat: Chat) -> Request:
            raise RequestError("too long")

    parts = [text_part("Both: "), image_part(), audio_part()]
    chats = read_chats(write(tmp_path, line(parts), line(parts)), RequestLimits())
    with pytest.raises(ProfileError, match="line 1: too long"):
        samples_of(chats, Refusing())
