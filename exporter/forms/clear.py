"""The CLEAR-MoE layer in graphs: standard operators, plain products with a mask or sorted segments (`exporter.passes.clear`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exporter.forms.form import LayerForm, StoredGraph, WeightProblem, compare, half_ulps, lacks
from exporter.forms.roofline import BYTES, TILE_TOKENS, operation_ms
from exporter.passes.clear import STORED_AT, Form
from moee.layers.activations import activate
from moee.layers.clear import ClearFFN
from moee.layers.clear_dispatch import Loop, apply_ffn
from plugins.devices import Profile

# Portable form by what was faster in ONNX Runtime on the CPU (docs/results/clear_moe.md): segments of fewer tokens than this make
# poor products, and without residual rank there is nothing to sort for
MIN_SEGMENT, USUAL_BATCH = 128, 8


class ClearForm(LayerForm[ClearFFN]):
    name, several = "clear-moe", True

    def apply(self, layer: ClearFFN, tokens: Tensor, chosen: Tensor) -> Tensor:
        parts, routes, y = layer.parts(), chosen[:, 0], torch.zeros_like(tokens)
        inside = ((routes >= 0) & (routes < layer.num_experts)).nonzero()[:, 0]
        if len(inside):
            y[inside] = apply_ffn(
                tokens[inside], routes[inside], parts.up, parts.down, lambda h: activate(h, layer.activation), via=Loop()
            )
        return y

    def scored(self, layer: ClearFFN, x: Tensor) -> tuple[Tensor, Tensor]:
        """A router of two layers passes the error of its features on: ReLU does not widen it."""
        if not len(layer.router_hidden):
            return super().scored(layer, x)
        rows, bias = layer.router_hidden, layer.router_hidden_bias
        return torch.relu(x @ rows.T + bias), half_ulps(x.shape[1]) * (x.abs() @ rows.abs().T + bias.abs())

    def title(self, plain: bool) -> str:
        return self.name

    def standard(self, name: str, layer: ClearFFN, graph: StoredGraph) -> bool:
        return True

    def portable(self, layer: ClearFFN, tokens: int) -> Form:
        """`masked` for layers without residual rank and for small segments; else `sorted`."""
        _, q1, _, q2 = layer.ranks
        return "masked" if q1 + q2 == 0 or USUAL_BATCH * tokens < MIN_SEGMENT * layer.num_experts else "sorted"

    def problems(self, name: str, layer: ClearFFN, graph: StoredGraph) -> list[WeightProblem]:
        found = []
        for part, (place, position) in STORED_AT.items():
            expected: Tensor = getattr(layer, part)
            if not expected.numel():  # a router of one layer has no hidden rows, a layer without ranks no factors
                continue
            node = graph.node(name, place)
            if node is None or position >= len(node.inputs):
                found.append(lacks(name, part, place, graph))
                continue
            value = node.inputs[position]
            before = value.producer() if value is not None else None
            if before is not None and before.op_type == "Cast":
                value = before.inputs[0]
            found += compare(name, part, value, expected, graph.dtype)
        return found

    def milliseconds(self, device: Profile, layer: ClearFFN, tokens: int) -> float:
        """TensorRT gets plain masked products: its products in turn."""
        rows = math.ceil(tokens / TILE_TOKENS) * TILE_TOKENS
        units = sum(layer.rank_units(masked=True))
        moved = float(BYTES * (layer.stored_numbers() + 2 * tokens * (layer.dim + layer.hidden + units)))
        return operation_ms(device, rows * layer.macs_per_token(masked=True), moved, 8)
