"""What all pictures share: matplotlib, the optional extra ``plot``, imported at the first one; colours; PNG files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipkernels.errors import SkipkernelsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2f6db5", "#f0a030", "#3a9a5b", "#eceff3"
_DPI = 150


def pyplot() -> Any:
    """matplotlib's pyplot.

    Raises:
        SkipkernelsError: there is no matplotlib. Call this before the work that a picture is made of.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise SkipkernelsError(
            "a picture needs matplotlib, which is not installed; `pip install skipkernels[plot]` brings it"
        ) from error
    return pyplot


def save(figure: Figure, path: str | Path) -> None:
    """Writes a PNG and forgets the figure.

    Raises:
        SkipkernelsError: the file cannot be written.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a token in a script the font lacks becomes a box
            figure.savefig(path, format="png", dpi=_DPI)
    except OSError as error:
        raise SkipkernelsError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        pyplot().close(figure)
