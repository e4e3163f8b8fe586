"""Figures of the numbers that `exporter.plots.data` computes. Each function takes such a dictionary and returns a figure."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from exporter.plots.figure import grid
from exporter.plots.tiles import cut, key
from moee.data.image_set import ImageSet
from moee.data.transform import Transform

TICK = 20  # characters of a class name beside its row
MAX_EXPERTS = 16  # rows of patches a layer; the busiest experts are shown


def routing(numbers: dict[str, Any]) -> Figure:
    """A heat map a layer: classes down, experts across, colour the share of the class's tokens."""
    layers = numbers["layers"]
    figure, panels = grid(len(layers))
    for axis, (name, shares) in zip(panels, layers.items(), strict=True):
        image = axis.imshow(np.asarray(shares), aspect="auto", vmin=0, cmap="viridis", interpolation="nearest")
        _label(axis, name, "expert", "class")
        if len(numbers["classes"]) <= 20:
            axis.set_yticks(range(len(numbers["names"])), [_tick(name) for name in numbers["names"]])
        figure.colorbar(image, ax=axis)
    return figure


def similarity(numbers: dict[str, Any]) -> Figure:
    """A heat map a layer: cosine similarity of each pair of experts' mean inputs."""
    layers = numbers["layers"]
    figure, panels = grid(len(layers))
    for axis, (name, matrix) in zip(panels, layers.items(), strict=True):
        image = axis.imshow(np.asarray(matrix), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        _label(axis, name, "expert", "expert")
        figure.colorbar(image, ax=axis)
    return figure


def curves(numbers: dict[str, Any]) -> Figure:
    """Two panels, a line a layer: variance and mean of the hidden neurons, sorted; the variance on a logarithmic scale."""
    figure, (left, right) = grid(2, width=5.0, height=3.6)
    layers = numbers["layers"]
    colours = _colours(len(layers))
    for colour, (name, values) in zip(colours, layers.items(), strict=True):
        share = np.linspace(0, 1, len(values["variance"]))
        left.plot(share, np.maximum(values["variance"], 1e-12), color=colour, label=name, linewidth=1)
        right.plot(share, values["mean"], color=colour, linewidth=1)
    left.set_yscale("log")
    for axis, what in ((left, "variance"), (right, "mean activation")):
        axis.set_xlabel("share of the neurons, sorted")
        axis.set_ylabel(what)
    left.legend(fontsize=6, ncols=2)
    return figure


def patches(numbers: dict[str, Any], data: ImageSet, transform: Transform) -> Figure:
    """A panel a layer: a row of image patches for each of its busiest experts."""
    layers = numbers["layers"]
    busiest = {n: sorted(range(len(experts)), key=lambda e: -experts[e]["share"])[:MAX_EXPERTS] for n, experts in layers.items()}
    places = {name: [place for e in chosen for place in layers[name][e]["patches"]] for name, chosen in busiest.items()}
    tiles = cut(places, data, transform)
    figure, panels = grid(len(layers), height=3.0)
    for axis, (name, experts) in zip(panels, layers.items(), strict=True):
        rows = [_strip([tiles[name][key(place)] for place in experts[e]["patches"]]) for e in busiest[name]]
        width = max(row.shape[1] for row in rows)
        tile = max(row.shape[0] for row in rows)
        canvas = np.ones((tile * len(rows), width, 3))
        for position, row in enumerate(rows):
            canvas[position * tile : position * tile + row.shape[0], : row.shape[1]] = row
        axis.imshow(canvas, interpolation="nearest", aspect="equal")
        axis.set_yticks(
            [position * tile + tile / 2 for position in range(len(rows))],
            [f"{e} ({experts[e]['share']:.0%})" for e in busiest[name]],
            fontsize=6,
        )
        axis.set_xticks([])
        axis.set_title(name)
        axis.set_ylabel("expert (share)")
    return figure


def _strip(tiles: list[Tensor]) -> np.ndarray:
    """An expert's patches side by side [height, width, 3] in 0..1, a white pixel between them."""
    parts = [np.pad(tile.permute(1, 2, 0).numpy(), ((0, 1), (0, 1), (0, 0)), constant_values=1.0) for tile in tiles]
    return np.concatenate(parts, axis=1) if parts else np.ones((1, 1, 3))


def _tick(name: str) -> str:
    """A class name as matplotlib writes it: short, and a dollar is no formula."""
    return (name if len(name) <= TICK else f"{name[: TICK - 1]}…").replace("$", r"\$")


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    """Title and names of the axes of a heat map, whose ticks are whole numbers."""
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))


def _colours(count: int) -> list[Any]:
    return [matplotlib.colormaps["viridis"](position) for position in np.linspace(0, 0.95, max(1, count))]
