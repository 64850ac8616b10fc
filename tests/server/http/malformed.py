"""HTTP requests that are wrong by construction, from a seed."""

import copy
import json
import math
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.server.http.fakes import COMPLETIONS, body
from tests.server.http.media import audio_part, image_file, image_part, text_part, wav_file

KEY = "the key"


@dataclass(frozen=True)
class Malformed:
    """``kind`` says what was done to it."""

    kind: str
    content: bytes
    method: str = "POST"
    path: str = COMPLETIONS
    headers: dict[str, str] = field(default_factory=dict)


IMAGE, AUDIO = image_part(), audio_part()
# what each field cannot be; absent ones take anything, or are exercised by a function of their own
IMPOSSIBLE: dict[str, list[Any]] = {
    "model": [None, 5, [], {}, True, "", "other", "echo ", "x" * 5000],
    "messages": [None, "hello", {}, [], 5, [None], ["hello"], [[]], [{}], [5]],
    "stream": [5, "true", [], {}, 1.0, 0],
    "stream_options": [5, [], {"include_usage": 1}, {"include": True}, {}, "x"],  # without stream, even {} is wrong
    "max_tokens": [0, -1, 1.5, "5", [], True, 1e400, math.nan],
    "max_completion_tokens": [0, -1, 1.5, "5", {}, False, -(10**30)],
    "temperature": [-1, 2.1, "hot", [], math.nan, math.inf, 1e-9, True],
    "top_p": [-0.1, 0, 1.1, "x", math.nan, {}],
    "top_k": [-2, 1.5, "x", 1 << 40, []],
    "min_p": [-0.1, 1.1, "x", math.nan],
    "repetition_penalty": [0, -1, 3, "x", math.inf],
    "seed": [1.5, "x", 1 << 63, -(1 << 63) - 1, 10**400, []],
    "stop": [5, [""], [5], ["a"] * 17, {}, "x" * 300, [["a"]]],
    "n": [0, 17, -1, 1.5, "1", []],
    "frequency_penalty": [2.1, -2.1, "0", math.nan],
    "presence_penalty": [3, -3, [], "x"],
    "user": [5, [], {}, True],
    "deadline_ms": [0, -5, math.nan, math.inf, -math.inf, "soon", [], True, -1e-300],
    "min_accuracy": [-0.1, 1.1, math.nan, math.inf, "high", [], 0.95, 1],  # the best reachable is below 0.8
}
CONTENTS: list[Any] = [
    None, 5, True, {}, [], "", [""], [None], [[]], [{}], [text_part("")], [{"type": "text"}], [{"type": 5}],
    [{"type": "text", "text": 5}], [{"type": "image", "text": "x"}], [text_part() | {"cache": True}], [IMAGE], [AUDIO],
]  # fmt: skip
URLS: list[Any] = [
    "", "x", "http://127.0.0.1:1/x.png", "https://example.org/x.png", "file:///etc/passwd", "ftp://example.org/x",
    "data:", "data:image/png", "data:image/png,abc", "data:image/png;base64", "data:image/png;base64,", "//x", "\u0000",
    "data:text/plain;base64,eA==", "data:image/png;base64,%%%", "data:image/png;base64,eA", "DATA:image/png;base64,e",
    5, None, [], {},
]  # fmt: skip
ROLES = [None, 5, "", "oracle", "function", "User", [], {}, "x" * 100]
ROUTES = [
    ("GET", COMPLETIONS), ("PUT", COMPLETIONS), ("DELETE", COMPLETIONS), ("HEAD", COMPLETIONS),
    ("OPTIONS", COMPLETIONS), ("POST", "/"),
    ("POST", "/v1"), ("POST", COMPLETIONS + "x"), ("POST", "/v1/completions"), ("POST", "/v1/models"),
    ("POST", "/../v1/chat"), ("GET", "/docs"), ("GET", "/.env"), ("GET", "/v1/models/other"), ("BREW", COMPLETIONS),
    ("GET", "/%00"), ("GET", "/\u2603"), ("PATCH", "/health"),
]  # fmt: skip
CONTENT_TYPES = [
    "",
    "text/plain",
    "application/xml",
    "multipart/form-data; boundary=x",
    "json",
    "application/jsonp",
    "*/*",
]
WRONG_KEYS = [
    "",
    "Bearer",
    "Bearer x",
    "Basic " + KEY,
    KEY,
    "Bearer " + KEY + "x",
    "Bearer " + "x" * 5000,
    "Bearer \x80",
]


def malformed(seed: int) -> Malformed:
    """The ``seed``-th of an endless row."""
    rng = random.Random(seed)
    return rng.choice(KINDS)(rng)


def _valid(rng: random.Random) -> dict[str, Any]:
    """A request that would be answered."""
    parts = [text_part(), *rng.sample([IMAGE, AUDIO, text_part("more")], rng.randint(0, 3))]
    asked = body(rng.choice(["hello", parts]), user="somebody", stop=["x"], max_tokens=5)
    for name, value in (("temperature", 0.5), ("seed", 7), ("stream", True), ("deadline_ms", 1e6), ("top_p", 0.5)):
        if rng.random() < 0.3:
            asked[name] = value
    if rng.random() < 0.3:
        asked["messages"].insert(0, {"role": "system", "content": "be brief"})
    return copy.deepcopy(asked)


def _dumped(kind: str, document: Any) -> Malformed:
    return Malformed(kind, json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _impossible_field(rng: random.Random) -> Malformed:
    asked, name = _valid(rng), rng.choice(list(IMPOSSIBLE))
    value = rng.choice(IMPOSSIBLE[name])
    if name == "stream_options":
        asked.pop("stream", None)
    if name.startswith("max_"):
        asked.pop("max_tokens")
    return _dumped(f"{name}: {value!r:.40}", asked | {name: value})


def _missing_field(rng: random.Random) -> Malformed:
    asked = _valid(rng)
    last = asked["messages"][-1]
    holders: list[tuple[dict[str, Any], list[str]]] = [(asked, ["model", "messages"]), (last, ["role", "content"])]
    if isinstance(last["content"], list):
        for part in last["content"]:
            holders.append((part, list(part)))
            holders += [
                (inner, ["url"] if "url" in inner else list(inner))
                for inner in part.values()
                if isinstance(inner, dict)
            ]
    holder, names = rng.choice(holders)
    name = rng.choice(names)
    del holder[name]
    return _dumped(f"without {name}", asked)


def _unknown_field(rng: random.Random) -> Malformed:
    asked = _valid(rng)
    name = "".join(rng.choices(string.printable, k=rng.randint(8, 20)))
    value = _anything(rng)
    rng.choice([asked, *asked["messages"]])[name] = 0 if value is None else value  # null is as good as nothing
    return _dumped(f"unknown {name!r}", asked)


def _impossible_content(rng: random.Random) -> Malformed:
    asked, content = _valid(rng), rng.choice(CONTENTS)
    asked["messages"] = [{"role": "user", "content": content}]
    return _dumped(f"content {content!r:.60}", asked)


def _impossible_role(rng: random.Random) -> Malformed:
    asked, role = _valid(rng), rng.choice(ROLES)
    rng.choice(asked["messages"])["role"] = role
    return _dumped(f"role {role!r:.20}", asked)


def _impossible_url(rng: random.Random) -> Malformed:
    asked, url = _valid(rng), rng.choice(URLS)
    asked["messages"][-1]["content"] = [text_part(), {"type": "image_url", "image_url": {"url": url}}]
    return _dumped(f"url {url!r}", asked)


def _broken_media(rng: random.Random) -> Malformed:
    """A file whose first bytes are random."""
    whole = rng.choice([image_file(kind=rng.choice(["PNG", "JPEG", "GIF"])), wav_file(0.01)])
    broken = rng.randbytes(12) + whole[12 : rng.randint(12, len(whole))]
    asked = _valid(rng)
    asked["messages"][-1]["content"] = [text_part(), rng.choice([image_part, audio_part])(broken)]
    return _dumped("broken media", asked)


def _cut_off(rng: random.Random) -> Malformed:
    whole = json.dumps(_valid(rng)).encode()
    return Malformed("cut off", whole[: rng.randrange(len(whole))])


def _garbled(rng: random.Random) -> Malformed:
    """A byte that can stand nowhere in JSON."""
    whole = json.dumps(_valid(rng)).encode()
    place = rng.randrange(len(whole))
    return Malformed("garbled", whole[:place] + bytes([rng.choice([0, 1, 7, 0x80, 0xC0, 0xFF])]) + whole[place + 1 :])


def _noise(rng: random.Random) -> Malformed:
    return Malformed("noise", rng.randbytes(rng.randint(0, 300)))


def _other_document(rng: random.Random) -> Malformed:
    return _dumped("another document", _anything(rng))


def _deep(rng: random.Random) -> Malformed:
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}"), ('{"messages":[', "]}")])
    depth = rng.randint(100, 20_000)
    return Malformed("deep", (opening * depth + "5" + closing * rng.choice([0, depth])).encode())


def _wrong_route(rng: random.Random) -> Malformed:
    method, path = rng.choice(ROUTES)
    return Malformed(f"{method} {path}", json.dumps(_valid(rng)).encode(), method, path)


def _wrong_type(rng: random.Random) -> Malformed:
    kind = rng.choice(CONTENT_TYPES)
    return Malformed(f"type {kind!r}", json.dumps(_valid(rng)).encode(), headers={"content-type": kind})


def _wrong_key(rng: random.Random) -> Malformed:
    key = rng.choice(WRONG_KEYS)
    return Malformed(f"key {key!r:.20}", json.dumps(_valid(rng)).encode(), headers={"authorization": key})


def _too_many(rng: random.Random) -> Malformed:
    asked = _valid(rng)
    if rng.random() < 0.5:
        asked["messages"] *= 1100
        return _dumped("messages", asked)
    asked["messages"][-1]["content"] = [text_part(), *([IMAGE] * rng.randint(65, 90))]
    return _dumped("parts", asked)


def _anything(rng: random.Random, depth: int = 0) -> Any:
    """JSON of any kind; never a request."""
    kind = rng.randrange(4 if depth > 3 else 6)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice([0, -1, 10**30, 1.5, -0.0, math.nan, math.inf, rng.random()])
    if kind <= 3:
        return "".join(rng.choices(string.printable + "é\u2603\U0001f600\u0000\ud800", k=rng.randint(0, 20)))
    if kind == 4:
        return [_anything(rng, depth + 1) for _ in range(rng.randint(0, 5))]
    return {f"key {number}": _anything(rng, depth + 1) for number in range(rng.randint(0, 5))}


KINDS: list[Callable[[random.Random], Malformed]] = [
    *[_impossible_field] * 5,
    *[_missing_field] * 2,
    *[_unknown_field, _impossible_content, _impossible_role, _impossible_url] * 2,
    *[_broken_media, _cut_off, _garbled] * 2,
    *[_noise, _other_document, _deep, _wrong_route, _wrong_type, _wrong_key, _too_many],
]
