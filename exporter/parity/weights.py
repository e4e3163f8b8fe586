"""The weights and tables inside `tensorrt.onnx` against the torch model's, bit for bit: what an engine is built from.

A `RoutedFFN` is a MoeeFfn node that holds them as inputs, or plain products if it has one expert; a `GatedFFN` is plain
products. A `ClearFFN` is standard operators. The weights of what is no MoeeFfn node are found at the nodes that use them, so a
weight of another layer in the right shape is noticed too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporter.onnx_safety import load_ir
from exporter.passes.clear import STORED_AT
from exporter.passes.gated import STORED_AT as GATED_AT
from exporter.passes.plain import FIRST
from exporter.passes.plain import STORED_AT as PLAIN_AT
from exporter.precision import ROUTER_BIASES
from moee.clear_moe import ClearFFN
from moee.gated import GatedFFN
from moee.layer import NeuronLayer, RoutedFFN, RoutedLayer
from plugins.contract import DOMAIN, INPUT_NAMES, OP_TYPE


@dataclass(frozen=True)
class WeightProblem:
    """A layer whose stored input, attribute or form is not the model's."""

    layer: str
    what: str
    message: str


def check_weights(graph: Path, layers: Mapping[str, RoutedLayer], dtype: torch.dtype) -> list[WeightProblem]:
    """Compare what the graph stores for every layer with the model's layer of its name; empty if all agree.

    `dtype` is the graph's token type: the model's weights are rounded to it, as the export does.
    """
    model = load_ir(graph)
    nodes = {n.name: n for n in model.graph if n.domain == DOMAIN and n.op_type == OP_TYPE}
    values = {v.name: v for n in model.graph for v in n.outputs}
    problems = [WeightProblem(str(n), "node", "the model lacks this layer of the graph") for n in nodes if n not in layers]
    for name, layer in layers.items():
        if isinstance(layer, ClearFFN):
            problems += _clear(name, values, layer, dtype, graph.name)
            continue
        if isinstance(layer, GatedFFN):
            problems += _plain(name, values, _gated_weights(layer), GATED_AT, dtype, graph.name)
            continue
        assert isinstance(layer, RoutedFFN), f"no check for {type(layer).__name__}"
        if is_plain(name, layer, values):
            problems += _plain(name, values, _plain_weights(layer), PLAIN_AT, dtype, graph.name)
        elif name in nodes:
            problems += _inputs(name, nodes[name], layer, dtype) + _attributes(name, nodes[name], layer)
        else:
            problems.append(WeightProblem(name, "node", f"{graph.name} has no MoeeFfn node of this name"))
    return problems


def _inputs(name: str, node: ir.Node, layer: RoutedFFN, dtype: torch.dtype) -> list[WeightProblem]:
    found = []
    for part, value in list(zip(INPUT_NAMES, node.inputs, strict=True))[1:]:
        found += _compare(name, part, value, getattr(layer, part), dtype)
    return found


def is_plain(name: str, layer: RoutedLayer, values: Mapping[str | None, ir.Value]) -> bool:
    """Whether a graph with these values, by name, holds the layer of one expert as plain products."""
    return isinstance(layer, NeuronLayer) and layer.num_experts == 1 and f"{name}/{FIRST}" in values


def _plain_weights(layer: RoutedFFN) -> dict[str, Tensor]:
    kept = layer.neurons.long()
    return {"w_up": layer.w_up[kept].T, "b_up": layer.b_up[kept], "w_down": layer.w_down[kept], "b_out": layer.b_out[0]}


def _gated_weights(layer: GatedFFN) -> dict[str, Tensor]:
    return {
        "w_gate": layer.w_gate.T, "b_gate": layer.b_gate, "w_up": layer.w_up.T, "b_up": layer.b_up, "w_down": layer.w_down,
        "b_out": layer.b_out[0],
    }  # fmt: skip


def _plain(
    name: str, values: Mapping[str | None, ir.Value], expected: Mapping[str, Tensor], places: Mapping[str, str],
    dtype: torch.dtype, graph: str,
) -> list[WeightProblem]:  # fmt: skip
    """Weights that plain products read, at the nodes `<layer>/<place>`."""
    found = []
    for part, place in places.items():
        node = values[f"{name}/{place}"].producer() if f"{name}/{place}" in values else None
        if node is None or len(node.inputs) != 2:
            found.append(WeightProblem(name, part, f"{graph} has no node {name}/{place}, which reads {part}; export it again"))
            continue
        found += _compare(name, part, node.inputs[1], expected[part], dtype)
    return found


def _clear(
    name: str, values: Mapping[str | None, ir.Value], layer: ClearFFN, dtype: torch.dtype, graph: str
) -> list[WeightProblem]:
    found = []
    for part, (place, position) in STORED_AT.items():
        expected: Tensor = getattr(layer, part)
        if not expected.numel():  # a router of one layer has no hidden rows, a layer without ranks no factors
            continue
        node = values[f"{name}/{place}"].producer() if f"{name}/{place}" in values else None
        if node is None or position >= len(node.inputs):
            found.append(WeightProblem(name, part, f"{graph} has no node {name}/{place}, which reads {part}; export it again"))
            continue
        value = node.inputs[position]
        before = value.producer() if value is not None else None
        if before is not None and before.op_type == "Cast":
            value = before.inputs[0]
        found += _compare(name, part, value, expected, dtype)
    return found


def _compare(name: str, part: str, value: ir.Value | None, tensor: Tensor, dtype: torch.dtype) -> list[WeightProblem]:
    """One stored tensor with the model's, which takes the type that the export gives it."""
    expected = tensor.detach()
    if expected.is_floating_point() and part not in ROUTER_BIASES:
        expected = expected.to(dtype)
    if value is None or value.const_value is None:
        return [WeightProblem(name, part, f"{part} is not stored in the graph")]
    stored = np.asarray(value.const_value.numpy())
    if stored.dtype.kind not in "fi":  # bfloat16 has a NumPy type of its own
        stored = stored.astype(np.float32)
    wanted = (expected.float() if expected.dtype == torch.bfloat16 else expected).numpy()
    if stored.shape != wanted.shape:
        return [WeightProblem(name, part, f"{part} has shape {stored.shape}, the model's has {wanted.shape}")]
    differ = stored != wanted
    if not differ.any():
        return []
    at = tuple(int(i) for i in np.argwhere(differ)[0])
    message = f"{part}: {int(differ.sum())} of {differ.size} values differ, first at {list(at)}: "
    return [WeightProblem(name, part, f"{message}graph {stored[at]}, model {wanted[at]}")]


def _attributes(name: str, node: ir.Node, layer: RoutedFFN) -> list[WeightProblem]:
    came = {name: a.value for name, a in node.attributes.items()}
    wanted = {"activation": layer.activation, "top_k": layer.top_k, "max_width": layer.max_width}
    differ = {k: (came.get(k), v) for k, v in wanted.items() if came.get(k) != v}
    return [WeightProblem(name, k, f"{k} is {theirs!r}, the model's is {ours!r}") for k, (theirs, ours) in differ.items()]
