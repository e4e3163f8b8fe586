"""Figures without global state: no pyplot, no window system, the same bytes for the same numbers."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moee.store.atomic import write_text

COLUMNS = 4
SETTINGS: dict[Any, Any] = {"svg.hashsalt": "moee", "svg.fonttype": "none", "font.size": 8}


def grid(count: int, width: float = 3.0, height: float = 2.4, columns: int = COLUMNS) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of `width` x `height` inches, filled row by row."""
    columns = min(columns, max(1, count))
    rows = max(1, math.ceil(count / columns))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
        axes = np.atleast_1d(figure.subplots(rows, columns)).flatten().tolist()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def to_svg(figure: Figure) -> str:
    """The figure as SVG text, with no date in it."""
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def save_svg(figure: Figure, path: Path) -> None:
    """Write the figure atomically."""
    write_text(path, to_svg(figure))
