"""Speech, thoughts and calls of tools, however the text is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.chat.reply_parser import Called, ReplyForm, ReplyParser, ReplyPart, Said, Thought

HERMES, LLAMA = ReplyForm("hermes", thinks=True), ReplyForm("llama3")
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
F, G = Called("f", '{"a": 1}'), Called("g", "{}")


def parse(form: ReplyForm, text: str, cuts: list[int]) -> list[ReplyPart]:
    """Neighbours of one kind joined."""
    parser, parts = ReplyParser(form), list[ReplyPart]()
    places = sorted({min(cut, len(text)) for cut in cuts})
    for begin, end in zip([0, *places], [*places, len(text)], strict=True):
        parts += parser.feed(text[begin:end])
    joined = list[ReplyPart]()
    for part in [*parts, *parser.end()]:
        last = joined[-1] if joined else None
        if isinstance(part, Said) and isinstance(last, Said):
            joined[-1] = Said(last.text + part.text)
        elif isinstance(part, Thought) and isinstance(last, Thought):
            joined[-1] = Thought(last.text + part.text)
        else:
            joined.append(part)
    return joined


@pytest.mark.parametrize(
    ("form", "text", "parts"),
    [
        (HERMES, f"<think>\nhm\nhm\n</think>\n\nSure.\n{CALL}", [Thought("hm\nhm"), Said("Sure."), F]),
        (HERMES, f"{CALL}\n{CALL}", [F, F]),
        (HERMES, "a < b, <tool> and <thin", [Said("a < b, <tool> and <thin")]),
        (HERMES, "so <tool_call>\nno JSON</tool_call> it", [Said("so <tool_call>\nno JSON</tool_call> it")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}}', [F]),
        (HERMES, "<think>never ends", [Thought("never ends")]),
        (ReplyForm(thinks=True, thinking=True), "deep</think>\n\n42", [Thought("deep"), Said("42")]),
        (LLAMA, '{"name": "f", "parameters": {"a": 1}}', [F]),
        (LLAMA, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', [F, G]),
        (LLAMA, "{braces} are no call", [Said("{braces} are no call")]),
        (LLAMA, 'A {"name": "f"} behind words', [Said('A {"name": "f"} behind words')]),
        (ReplyForm(), f"<think>{CALL}", [Said(f"<think>{CALL}")]),
    ],
)
@given(cuts=st.lists(st.integers(0, 90), max_size=8))
def test_parts(form: ReplyForm, text: str, parts: list[ReplyPart], cuts: list[int]) -> None:
    assert parse(form, text, cuts) == parts
    assert parse(form, text, list(range(len(text)))) == parts
