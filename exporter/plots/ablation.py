"""Plots of an ablation: retention over MACs, one figure a table, from `ablation.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from exporter.plots.figure import grid, save_svg

METRICS = (("accuracy", "accuracy"), ("class_cosine", "class cosine"))


def table_figure(table: dict[str, Any]) -> Figure | None:
    """A panel a compensation and metric; a line a row, with the seeds' deviation as bars. None where no cell was routed."""
    rows = [row for row in table["rows"] if row["macs_change"] is not None]
    metrics = [(key, label) for key, label in METRICS if any(row[key] is not None for row in rows)]
    compensations = list(dict.fromkeys(row["compensation"] for row in rows))
    if not metrics or not compensations:
        return None
    figure, panels = grid(len(metrics) * len(compensations), width=4.0, height=3.2, columns=len(metrics))
    labels = list(dict.fromkeys(row["row"] for row in rows))
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    pairs = [(compensation, metric) for compensation in compensations for metric in metrics]
    for axis, (compensation, (key, metric)) in zip(panels, pairs, strict=True):
        for colour, label in enumerate(labels):
            mine = [r for r in rows if (r["row"], r["compensation"]) == (label, compensation) and r[key] is not None]
            mine.sort(key=lambda r: r["macs_change"]["mean"])
            axis.errorbar(
                [100 * r["macs_change"]["mean"] for r in mine], [r[key]["mean"] for r in mine],
                yerr=[r[key]["deviation"] for r in mine], color=colours[colour % len(colours)], marker="o", markersize=3,
                linewidth=1, capsize=2, label=label,
            )  # fmt: skip
        axis.set_title(f"compensation {compensation}")
        axis.set_xlabel("MACs, % of change")
        axis.set_ylabel(metric)
    panels[0].legend(fontsize=6)
    return figure


def draw_ablation(summary: dict[str, Any], out: Path) -> list[str]:
    """Write one SVG a table into `out`; returns the file names."""
    names = []
    for key, table in summary["tables"].items():
        figure = table_figure(table)
        if figure is not None:
            name = f"{key if key.startswith('fig') else f'table{key}'}.svg"
            save_svg(figure, out / name)
            names.append(name)
    return names
