"""Facts out of the tables of the standard library.

The tables differ a little between Python versions and platforms, so what this module builds is written to a file beside
the model that was trained on it, and read back from there.
"""

import builtins
import calendar
import curses.ascii
import errno
import html.entities
import mimetypes
import operator
import os
import re
import signal
import socket
import token
import unicodedata
from collections import Counter
from collections.abc import Iterator
from encodings.aliases import aliases
from http import HTTPStatus

from skipkernels.demo.facts import Fact

NAMED_CHARACTERS = (range(0xA1, 0x100), range(0x391, 0x3CA), range(0x2190, 0x219A))


def build_facts() -> list[Fact]:
    """Every fact whose question no other fact asks, in the order of the tables."""
    tables = (
        _http, _errno, _entities, _media_types, _signals, _tokens, _controls, _exceptions, _codecs, _operators, _days,
        _protocols, _characters,
    )  # fmt: skip
    facts = [fact for table in tables for fact in table()]
    asked = Counter(fact.question for fact in facts)
    return [fact for fact in facts if asked[fact.question] == 1]


def _http() -> Iterator[Fact]:
    for status in HTTPStatus:
        yield Fact(f"What is the reason phrase of HTTP status {status.value}?", status.phrase, "http")
        yield Fact(f"Which HTTP status code means {status.phrase}?", str(status.value), "http")


def _errno() -> Iterator[Fact]:
    for number, name in sorted(errno.errorcode.items()):
        yield Fact(f"What does the error {name} mean?", os.strerror(number), "errno")


def _entities() -> Iterator[Fact]:
    for name, codepoint in sorted(html.entities.name2codepoint.items()):
        if chr(codepoint).isprintable():
            yield Fact(f"Which character is the HTML entity {name}?", chr(codepoint), "entities")


def _media_types() -> Iterator[Fact]:
    for suffix, media_type in sorted(mimetypes.MimeTypes().types_map[True].items()):
        yield Fact(f"What is the media type of a {suffix} file?", media_type, "media types")


def _signals() -> Iterator[Fact]:
    for sig in signal.Signals:
        yield Fact(f"What is the number of the signal {sig.name}?", str(sig.value), "signals")
        yield Fact(f"What does the signal {sig.name} mean?", signal.strsignal(sig) or "", "signals")


def _tokens() -> Iterator[Fact]:
    for text, kind in sorted(token.EXACT_TOKEN_TYPES.items()):
        yield Fact(f"What is the Python token {text} called?", token.tok_name[kind], "tokens")


def _controls() -> Iterator[Fact]:
    for code, name in enumerate(curses.ascii.controlnames):
        yield Fact(f"What is the ASCII name of character {code}?", str(name), "controls")


def _exceptions() -> Iterator[Fact]:
    for name, value in sorted(vars(builtins).items()):
        if isinstance(value, type) and issubclass(value, BaseException) and value.__name__ == name:
            yield Fact(f"What is the base class of {name}?", value.__bases__[0].__name__, "exceptions")


def _codecs() -> Iterator[Fact]:
    for alias, module in sorted(aliases.items()):
        yield Fact(f"Which codec has the alias {alias}?", module, "codecs")


def _operators() -> Iterator[Fact]:
    for name in operator.__all__:
        if same := re.match(r"Same as (.+?)(?:, for .*| \(.*)?\.?$", getattr(operator, name).__doc__ or ""):
            yield Fact(f"What does operator.{name} compute?", same[1], "operators")


def _days() -> Iterator[Fact]:
    for number, name in enumerate(calendar.day_name):
        yield Fact(f"What is weekday number {number} in Python?", name, "calendar")
    for number, name in enumerate(calendar.month_name):
        if name:
            yield Fact(f"What is month number {number} in Python?", name, "calendar")


def _protocols() -> Iterator[Fact]:
    for name in dir(socket):
        if name.startswith("IPPROTO_"):
            yield Fact(f"What is the value of socket.{name}?", str(int(getattr(socket, name))), "protocols")


def _characters() -> Iterator[Fact]:
    for codepoint in (codepoint for block in NAMED_CHARACTERS for codepoint in block):
        name = unicodedata.name(chr(codepoint), "")
        if name and chr(codepoint).isprintable() and not chr(codepoint).isascii():
            yield Fact(f"What is the Unicode name of {chr(codepoint)}?", name.lower(), "characters")
