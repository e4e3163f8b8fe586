"""The routed FFN in graphs: a MoeeFfn node that holds everything as inputs; plain products where it has one expert."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from exporter.forms.form import LayerForm, StoredGraph, WeightProblem, by_neurons, compare, read_by_nodes
from exporter.forms.roofline import mlp_ms, routed_ms
from exporter.passes.plain import FIRST, STORED_AT
from moee.layers.routed import RoutedFFN
from plugins.contract import INPUT_NAMES
from plugins.devices import Profile


class RoutedForm(LayerForm[RoutedFFN]):
    name = "moee"

    def apply(self, layer: RoutedFFN, tokens: Tensor, chosen: Tensor) -> Tensor:
        return by_neurons(layer, tokens, chosen)

    def standard(self, name: str, layer: RoutedFFN, graph: StoredGraph) -> bool:
        return layer.num_experts == 1 and f"{name}/{FIRST}" in graph.values

    def problems(self, name: str, layer: RoutedFFN, graph: StoredGraph) -> list[WeightProblem]:
        if self.standard(name, layer, graph):
            return read_by_nodes(name, _plain_weights(layer), STORED_AT, graph)
        if name not in graph.nodes:
            return [WeightProblem(name, "node", f"{graph.name} has no MoeeFfn node of this name")]
        node, found = graph.nodes[name], []
        for part, value in list(zip(INPUT_NAMES, node.inputs, strict=True))[1:]:
            found += compare(name, part, value, getattr(layer, part), graph.dtype)
        return found + _attributes(name, node, layer)

    def milliseconds(self, device: Profile, layer: RoutedFFN, tokens: int) -> float:
        """The fastest of the plugin's forms, at the calibrated load; one expert is two plain products."""
        dim, widths = layer.w_up.shape[1], layer.widths
        if len(widths) == 1:
            return mlp_ms(device, dim, widths[0], tokens)
        load = [part / sum(layer.load) for part in layer.load] if layer.load else [1 / len(widths)] * len(widths)
        return routed_ms(device, dim, widths, load, tokens=tokens, top_k=layer.top_k)


def _plain_weights(layer: RoutedFFN) -> dict[str, Tensor]:
    kept = layer.neurons.long()
    return {"w_up": layer.w_up[kept].T, "b_up": layer.b_up[kept], "w_down": layer.w_down[kept], "b_out": layer.b_out[0]}


def _attributes(name: str, node: ir.Node, layer: RoutedFFN) -> list[WeightProblem]:
    came = {name: a.value for name, a in node.attributes.items()}
    wanted = {"activation": layer.activation, "top_k": layer.top_k, "max_width": layer.max_width}
    differ = {k: (came.get(k), v) for k, v in wanted.items() if came.get(k) != v}
    return [WeightProblem(name, k, f"{k} is {theirs!r}, the model's is {ours!r}") for k, (theirs, ours) in differ.items()]
