"""The pruned gated MLP in graphs: plain products in all of them."""

from __future__ import annotations

from torch import Tensor

from exporter.forms.form import LayerForm, StoredGraph, WeightProblem, by_neurons, read_by_nodes
from exporter.forms.roofline import mlp_ms
from exporter.passes.gated import READERS, STORED_AT
from moee.mlps.gated import GatedFFN
from plugins.devices import Profile


class GatedForm(LayerForm[GatedFFN]):
    name = "gated"

    def apply(self, layer: GatedFFN, tokens: Tensor, chosen: Tensor) -> Tensor:
        return by_neurons(layer, tokens, chosen)

    def title(self, plain: bool) -> str:
        return "plain" if plain else "moee"

    def standard(self, name: str, layer: GatedFFN, graph: StoredGraph) -> bool:
        return f"{name}/{READERS[-1]}" in graph.values

    def problems(self, name: str, layer: GatedFFN, graph: StoredGraph) -> list[WeightProblem]:
        weights = {
            "w_gate": layer.w_gate.T, "b_gate": layer.b_gate, "w_up": layer.w_up.T, "b_up": layer.b_up,
            "w_down": layer.w_down, "b_out": layer.b_out[0],
        }  # fmt: skip
        return read_by_nodes(name, weights, STORED_AT, graph)

    def milliseconds(self, device: Profile, layer: GatedFFN, tokens: int) -> float:
        return mlp_ms(device, layer.w_up.shape[1], layer.union, tokens, 3)
