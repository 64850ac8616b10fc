"""Pictures: nothing lies on anything else. What they show is looked at by people."""

from pathlib import Path

import numpy as np
import pytest

from skipkernels.calibration.plots import plot_trace
from skipkernels.calibration.trace import Cell, TraceMap

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("tokens", [4, 40])
def test_title_and_legend_of_a_trace_do_not_overlap(
    tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr("skipkernels.calibration.plots.save", lambda figure, path: figures.append(figure))
    cells = np.full((tokens, 30), Cell.RUN, dtype=np.int8)
    trace = TraceMap(tuple("abcd" * 10)[:tokens], cells, np.full((tokens, 30), 0.25, np.float32))
    title = (
        "24.6% of the FFN bytes not read: similarity >= 0.97, span 2, dense 12+14, neurons below thresholds per layer"
    )
    plot_trace(trace, tmp_path / "trace.png", title)
    (figure,) = figures
    figure.canvas.draw()
    axes = figure.axes[0]
    heading, legend = axes.title if axes.title.get_text() else axes._left_title, axes.get_legend()
    drawn, below = heading.get_window_extent(), legend.get_window_extent()
    assert drawn.y0 >= below.y1 - 1
    assert max(drawn.x1, below.x1) <= figure.bbox.x1
