"""The trace map: for every generated token and layer, whether the FFN ran, was skipped, or started a skip, and how much
of its bytes was not read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rich.text import Text

from skipkernels.decoding.generation import Generation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Cell(IntEnum):
    """What one FFN of one token did."""

    RUN = 0
    SKIPPED = 1
    TRIGGERED = 2  # ran, and started a skip of the layers after it


GLYPHS = {Cell.RUN: ("█", "blue"), Cell.SKIPPED: ("·", "bright_black"), Cell.TRIGGERED: ("◆", "yellow")}
MEANINGS = {Cell.RUN: "ran", Cell.SKIPPED: "skipped", Cell.TRIGGERED: "ran and started a skip"}
_BARS = " ▁▂▃▄▅▆▇█"
_NEURONS = ("▁▂▃▄▅▆▇", "cyan")
"""An FFN that left out neurons: the height is the share of its bytes that it read."""
_TOKEN_WIDTH = 14
_PICTURES = {"\n": "⏎", "\t": "⇥"}


@dataclass(frozen=True)
class TraceMap:
    """One generation, cell by cell."""

    tokens: tuple[str, ...]
    cells: npt.NDArray[np.int8]  # [tokens, layers], of Cell
    unread: npt.NDArray[np.float32]  # [tokens, layers], share of the FFN's bytes not read
    first: int = 1  # number of the first token

    @classmethod
    def of(cls, generation: Generation, tokenizer: PreTrainedTokenizerBase | None) -> TraceMap:
        """A layer started a skip where it ran and was tested, and the next one was skipped."""
        skipped = generation.skip_map
        cells = np.where(skipped, Cell.SKIPPED, Cell.RUN).astype(np.int8)
        tested = ~np.isnan(generation.similarity_map[:, :-1])
        cells[:, :-1][tested & ~skipped[:, :-1] & skipped[:, 1:]] = Cell.TRIGGERED
        return cls(tuple(token_texts(generation.token_ids, tokenizer)), cells, generation.unread_map)

    def part(self, start: int, stop: int) -> TraceMap:
        """The tokens from index ``start`` to before ``stop``."""
        return TraceMap(self.tokens[start:stop], self.cells[start:stop], self.unread[start:stop], self.first + start)

    @property
    def left_out(self) -> npt.NDArray[np.float32]:
        """[tokens, layers]: the unread share of FFNs that ran, 0 elsewhere."""
        return np.where(self.skipped, 0, self.unread)

    @property
    def skipped(self) -> npt.NDArray[np.bool_]:
        return self.cells == Cell.SKIPPED


def token_texts(token_ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """The text of each token, control characters made visible; its id where there is no tokenizer."""
    for token_id in token_ids:
        text = str(token_id) if tokenizer is None else str(tokenizer.decode([token_id]))
        yield "".join(character if character.isprintable() else _picture(character) for character in text)


def _picture(control: str) -> str:
    """A visible character for a control character, which a terminal would obey."""
    code = ord(control)
    return _PICTURES.get(control) or (chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}")


def render(trace: TraceMap, width: int) -> Text:
    """The map for a terminal of ``width`` columns: a line per token, a character per layer. Layers that do not fit
    beside one another follow in further blocks."""
    layers = trace.cells.shape[1]
    per_block = max(8, width - _TOKEN_WIDTH - 16)
    lines = Text()
    for start in range(0, layers, per_block):
        _append_block(lines, trace, start, min(start + per_block, layers))
    return lines


def legend(trace: TraceMap) -> Text:
    """What the characters of the map mean, of those it has."""
    line = Text("  ")
    for cell, (glyph, style) in GLYPHS.items():
        if (trace.cells == cell).any():
            line.append(glyph, style).append(f" {MEANINGS[cell]}   ", "dim")
    if (trace.left_out > 0).any():
        line.append(*_NEURONS).append(" left out neurons: height is the share of bytes read", "dim")
    return line


def _append_block(lines: Text, trace: TraceMap, start: int, end: int) -> None:
    """Layers ``start`` to ``end`` of the map: header, tokens, totals."""
    numbers = [f"{layer % 100:>2}" if layer % 2 == 0 else "  " for layer in range(start, end)]
    margin = " " * (_TOKEN_WIDTH + 6)
    for digit, name in enumerate(("layer", "")):
        lines.append(f"{name:<{len(margin)}}{''.join(number[digit] for number in numbers)}", "dim")
        lines.append("  not read\n" if digit else "\n", "dim")
    left_out = trace.left_out[:, start:end]
    for index, (token, cells) in enumerate(zip(trace.tokens, trace.cells[:, start:end], strict=True)):
        lines.append(f"{trace.first + index:>4}  ", "dim")
        shown = Text(token)
        shown.truncate(_TOKEN_WIDTH - 1, overflow="ellipsis", pad=True)
        lines.append_text(shown).append(" ")
        for cell, missing in zip(cells, left_out[index], strict=True):
            lines.append(*(_partial(missing) if missing > 0 else GLYPHS[Cell(cell)]))
        lines.append(f"  {trace.unread[index, start:end].mean():>6.0%}\n", "dim")
    share = trace.unread[:, start:end].mean(axis=0)
    bars = "".join(_BARS[round(value * (len(_BARS) - 1))] for value in share)
    lines.append(f"{'not read':<{len(margin)}}", "dim").append(bars, "green")
    lines.append(f"  {trace.unread[:, start:end].mean():>6.0%}\n", "dim")


def _partial(missing: float) -> tuple[str, str]:
    bars, style = _NEURONS
    return bars[min(len(bars) - 1, int((1 - missing) * len(bars)))], style
