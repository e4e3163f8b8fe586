"""The numbers behind the plots of an artifact, as plain JSON values; drawing is elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exporter.plots.nearest import NearestTokens
from moee.artifacts.model import MoeeModel
from moee.calibrate.calibration import CHUNK, collect_tokens, hidden_activations
from moee.calibrate.image_budget import spread
from moee.data.image_set import ImageSet, batches
from moee.data.transform import model_transform
from moee.interface.adapted import run_model
from moee.interface.watch import watched
from moee.layers.routed import routed_layers
from moee.mlps.find import find_ffns
from moee.models.ffn import plain_size
from moee.models.model import Shape
from moee.progress import Reporter, silent, track
from moee.store.scratch import temporary_folder
from moee.tokens.block import merging_blocks

BATCH = 32
CURVE_TOKENS = 20_000
PATCHES = 8  # shown of each expert
NO_GRID = "its tokens form no grid of the image"
NO_ROW = "its experts have no router row of the tokens' width"


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts the tokens of some images took.

    `indices` [N] and `labels` [N] int64 (-1: none) of the images, the names of the `classes`, and the model's `outputs` [N, C];
    per layer `routes` [N, T, top_k] int64, its number of `experts`, how many of the T tokens precede the `grids` [rows, cols] of
    patches (None where T is no grid), and the `nearest` tokens of its experts, where they have a row to be near to.
    """

    shape: Shape
    indices: Tensor
    labels: Tensor
    routes: dict[str, Tensor]
    experts: dict[str, int]
    grids: dict[str, tuple[int, int, int] | None]
    outputs: Tensor
    nearest: dict[str, NearestTokens]
    classes: tuple[str, ...] = ()


@torch.inference_mode()
def trace_routes(moee: MoeeModel, data: ImageSet, images: int = 256, report: Reporter = silent) -> RoutingTrace:
    """Run at most `images` images, spread evenly over `data`, and record every routed layer's experts."""
    layers = routed_layers(moee.model)
    prefix = int(getattr(moee.model, "num_prefix_tokens", 0))
    merging = tuple(f"{name}." for name in merging_blocks(moee.model))
    collected: dict[str, list[Tensor]] = {name: [] for name in layers}
    grids: dict[str, tuple[int, int, int] | None] = {}
    nearest: dict[str, NearestTokens] = {}
    shape = model_transform(moee.model).shape
    indices: list[Tensor] = []
    labels, outputs = [], []

    def record(name: str, x: Tensor) -> None:
        layer = layers[name]
        merged = name.startswith(merging)  # as many tokens as a smaller grid has are none
        grid = grids[name] = None if merged else _grid(x, prefix, layer.channels_first, shape)
        routes = layer.routes(x).reshape(len(x), -1, layer.top_k)
        collected[name].append(routes)
        x, rows = x.movedim(1, -1) if layer.channels_first else x, layer.router
        if grid is not None and rows is not None and rows.shape[1] == x.shape[-1]:
            kept = nearest.setdefault(name, NearestTokens(rows, PATCHES))
            kept.add(x.reshape(len(x), -1, x.shape[-1])[:, grid[0] :], routes[:, grid[0] :], indices[-1])

    order = spread(len(data), min(images, len(data)))
    with watched(moee.model, layers, record):
        for batch in track(batches(data, BATCH, order=order), "routes", math.ceil(len(order) / BATCH), report):
            indices.append(batch.indices)
            labels.append(batch.labels)
            outputs.append(run_model(moee.model, batch.images)[0])
    routes = {name: torch.cat(parts) for name, parts in collected.items()}
    return RoutingTrace(
        shape, torch.cat(indices), torch.cat(labels), routes, {n: layer.num_experts for n, layer in layers.items()}, grids,
        torch.cat(outputs), nearest, data.classes,
    )  # fmt: skip


def _grid(x: Tensor, prefix: int, channels_first: bool, shape: Shape) -> tuple[int, int, int] | None:
    """(tokens before the grid, rows, columns) of a layer's input, or None if its tokens form no grid as the image is."""
    if x.dim() == 4:
        return (0, *x.shape[2:]) if channels_first else (0, *x.shape[1:3])
    _, height, width = shape
    for before in dict.fromkeys((prefix, 0)):
        count = x.shape[1] - before
        rows = round(math.sqrt(count * height / width))
        columns = round(math.sqrt(count * width / height))
        if rows * columns == count and rows * width == columns * height:
            return before, rows, columns
    return None


def routing_by_class(trace: RoutingTrace) -> dict[str, Any]:
    """Share of each class's tokens that each expert gets, per layer (paper, Figures 2 to 4 and 8).

    {"classes": [class id], "names": [per class], "images": [per class], "layers": {name: [[share an expert] a class]}}; class -1
    are the images without a label.
    """
    classes = trace.labels.unique().tolist()
    layers = {}
    for name, routes in trace.routes.items():
        rows = []
        for label in classes:
            taken = torch.bincount(routes[trace.labels == label].flatten(), minlength=trace.experts[name])
            rows.append(_rounded(taken.double() / taken.sum()))
        layers[name] = rows
    counts = [int((trace.labels == label).sum()) for label in classes]
    without = "no label" if len(classes) > 1 else "all"
    names = [without if label < 0 else trace.classes[label] if trace.classes else str(label) for label in classes]
    return {"schema": "moee.plot-routing/1", "classes": classes, "names": names, "images": counts, "layers": layers}


def router_similarity(model: nn.Module) -> dict[str, Any]:
    """Cosine similarity of the experts' router rows per layer: {"layers": {name: K x K}}; paper, Figure 5. The rows are
    mean inputs, or in CLEAR-MoE whatever its router learned."""
    layers = {}
    for name, layer in routed_layers(model).items():
        if layer.router is None:
            continue
        rows = nn.functional.normalize(layer.router.detach().double(), dim=1)
        layers[name] = [_rounded(row) for row in rows @ rows.T]
    return {"schema": "moee.plot-similarity/1", "layers": layers}


@torch.inference_mode()
def neuron_curves(dense: nn.Module, data: ImageSet, report: Reporter = silent) -> dict[str, Any]:
    """Variance and mean of every hidden neuron of the dense MLPs on calibration images, each sorted from high to low (paper,
    Figure 9): {"tokens": N, "layers": {name: {"variance": [H], "mean": [H]}}}."""
    ffns = find_ffns(dense, gated=True).ffns
    layers = {}
    with temporary_folder() as folder:
        sampled = collect_tokens(dense, ffns, data, folder, CURVE_TOKENS, seed=0, report=report)
        for ffn, layer in zip(ffns, sampled, strict=True):
            total, squares = torch.zeros(ffn.hidden).double(), torch.zeros(ffn.hidden).double()
            for part in torch.arange(layer.count).split(CHUNK):
                hidden = hidden_activations(ffn, layer.load(part)).double()
                total += hidden.sum(0)
                squares += hidden.square().sum(0)
            mean = total / layer.count
            variance = (squares / layer.count - mean.square()).clamp(min=0)
            layers[ffn.name] = {
                "variance": _rounded(variance.sort(descending=True).values),
                "mean": _rounded(mean.sort(descending=True).values),
            }
    return {"schema": "moee.plot-curves/1", "tokens": sampled[0].count, "layers": layers}


def expert_patches(trace: RoutingTrace, per_expert: int = PATCHES) -> dict[str, Any]:
    """Image patches whose tokens lie nearest each expert's router row, of those that it gets, one an image (after the paper's
    Figure 10, which draws them at random).

    {"layers": {name: [{"share": of the patches, "patches": [{"image", "top", "left", "height", "width", "cosine"}]} an expert]},
    "left_out": {name: why}}: image is the position in the data set, the rest pixels. Class and register tokens have no patch.
    """
    layers: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, str] = {}
    for name, routes in trace.routes.items():
        grid = trace.grids[name]
        if grid is None or name not in trace.nearest:
            left_out[name] = NO_GRID if grid is None else NO_ROW
            continue
        before, rows, columns = grid
        height, width = trace.shape[1] // rows, trace.shape[2] // columns
        on_grid = routes[:, before:]
        experts = []
        for e, places in enumerate(trace.nearest[name].places(per_expert)):
            taken = int((on_grid == e).any(-1).sum())
            experts.append(
                {
                    "share": round(taken / on_grid[..., 0].numel(), 6),
                    "patches": [
                        {
                            "image": image, "top": token // columns * height, "left": token % columns * width, "height": height,
                            "width": width, "cosine": round(cosine, 6),
                        }
                        for image, token, cosine in places
                    ],
                }
            )  # fmt: skip
        layers[name] = experts
    return {"schema": "moee.plot-patches/2", "size": plain_size(trace.shape), "layers": layers, "left_out": left_out}


def _rounded(values: Tensor) -> list[float]:
    """Floats of six significant digits: what a plot can show."""
    return [float(f"{v:.6g}") for v in values.tolist()]
