"""Layers of a graph by themselves, on tokens and routes that are dictated, so that each expert works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exporter.forms.form import WeightProblem
from exporter.forms.registry import form_of
from exporter.graph.export import TENSORRT
from exporter.parity.layers import alone, wrong_routes
from exporter.parity.stats import within
from exporter.parity.taps import Tap, probe_graph
from exporter.parity.weights import stored_graph
from exporter.precision import PRECISIONS
from exporter.runners import graph_runner
from moee.layers.routed import RoutedLayer

PROBES = 16  # tokens for each expert


@dataclass(frozen=True)
class Probe:
    """A layer's result on dictated routes, and `routes` [N, k], the ones that its own router wanted for these tokens."""

    tap: Tap
    routes: Tensor


def probe_routes(layer: RoutedLayer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [N, D] and routes [N, k] that give each expert `PROBES` tokens, drawn evenly from `tokens`."""
    count = max(layer.num_experts * PROBES, 1)
    picked = tokens[torch.arange(count) * len(tokens) // count]
    experts = torch.arange(count) % layer.num_experts
    return picked, torch.stack([(experts + i) % layer.num_experts for i in range(layer.top_k)], 1)


def probe_layers(
    graph: Path, layers: Mapping[str, RoutedLayer], reference: dict[str, Tap], dtype: torch.dtype, threads: int | None,
    *, provider: str, widened: bool,
) -> dict[str, Probe]:  # fmt: skip
    """Run the named layers of `graph` on tokens of the float64 run `reference`, rounded to the graph's type `dtype`."""
    precision = {v: k for k, v in PRECISIONS.items()}[dtype]
    taps, feeds = {}, {}
    for name, layer in layers.items():
        tokens, routes = probe_routes(layer, reference[name].tokens)
        tokens = tokens.to(dtype).float()
        feeds[f"{name}/probe_tokens"], feeds[f"{name}/probe_route"] = tokens.numpy(), routes.reshape(-1).numpy()
        taps[name] = Tap(tokens, routes, tokens)
    with probe_graph(graph, list(layers), precision, widened) as path, graph_runner(path, threads, provider) as runner:
        outputs = [torch.from_numpy(a) for a in runner.run_feeds(feeds)]
    found = {}
    for name, result, wanted in zip(layers, outputs[::2], outputs[1::2], strict=True):
        tap = taps[name]
        found[name] = Probe(
            Tap(tap.tokens, tap.route, result.reshape(tap.tokens.shape)), wanted.reshape(tap.route.shape)
        )
    return found


def standard_layers(folder: Path, layers: Mapping[str, RoutedLayer]) -> dict[str, RoutedLayer]:
    """The layers that are standard operators in `tensorrt.onnx`: CLEAR-MoE's and those of one expert."""
    stored = stored_graph(folder / TENSORRT, torch.float32)
    return {name: layer for name, layer in layers.items() if form_of(layer).standard(name, layer, stored)}


def check_form(
    folder: Path, standard: dict[str, RoutedLayer], own: dict[str, RoutedLayer], reference: dict[str, Tap], dtype: torch.dtype,
    *, threads: int | None, provider: str, widened: bool,
) -> list[WeightProblem]:  # fmt: skip
    """Run what `tensorrt.onnx` holds in the place of each of the `standard` layers, which are in float64: equal weights alone do
    not show that it computes the layer. Empty if all do. `own` as in `layer_parity`."""
    if not standard:
        return []
    problems = []
    probes = probe_layers(folder / TENSORRT, standard, reference, dtype, threads, provider=provider, widened=widened)
    for name, probe in probes.items():
        stats, allowed = alone(standard[name], own[name], probe.tap)
        if not stats.count or not within(stats.max_abs_error, allowed):
            message = f"{TENSORRT}: the layer alone is off by {stats.max_abs_error:.2e} of {allowed:.2e} allowed"
            problems.append(WeightProblem(name, "form", message))
        wrong = int((wrong_routes(standard[name], probe.tap.tokens, probe.routes) > 0).sum())
        if wrong:
            message = f"{TENSORRT}: {wrong} of {len(probe.routes)} tokens take an expert that is not their best"
            problems.append(WeightProblem(name, "routes", message))
    return problems
