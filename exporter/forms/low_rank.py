"""The low-rank MLP in graphs: plain products in all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exporter.forms.form import LayerForm, StoredGraph, WeightProblem, read_by_nodes
from exporter.forms.roofline import BYTES, TILE_TOKENS, operation_ms
from exporter.passes.low_rank import FIRST, STORED_AT
from moee.layers.low_rank import NAMES, LowRankFFN
from plugins.devices import Profile

PRODUCTS = 4


class LowRankForm(LayerForm[LowRankFFN]):
    name = "lowrank"

    def apply(self, layer: LowRankFFN, tokens: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(tokens)
        inside = (chosen == 0).any(1)
        y[inside] = layer.products(tokens[inside])
        return y

    def title(self, plain: bool) -> str:
        return self.name

    def standard(self, name: str, layer: LowRankFFN, graph: StoredGraph) -> bool:
        return f"{name}/{FIRST}" in graph.values

    def problems(self, name: str, layer: LowRankFFN, graph: StoredGraph) -> list[WeightProblem]:
        weights = {part: getattr(layer, part).T if part.endswith("_in") else getattr(layer, part) for part in NAMES}
        return read_by_nodes(name, weights, STORED_AT, graph)

    def milliseconds(self, device: Profile, layer: LowRankFFN, tokens: int) -> float:
        """Four products in turn."""
        rows = math.ceil(tokens / TILE_TOKENS) * TILE_TOKENS
        between = 2 * tokens * (layer.dim + layer.hidden + sum(layer.ranks))  # each is written once and read once
        return operation_ms(device, rows * layer.macs_per_token(), float(BYTES * (layer.stored_numbers() + between)), PRODUCTS)
