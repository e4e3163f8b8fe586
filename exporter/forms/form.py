"""What a kind of routed layer is outside PyTorch: its arithmetic by parts, the form of its graphs, what they store, its modelled
time. `exporter.forms.registry` lists the forms; each has the name of its `moee.kinds.kind.LayerKind`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporter.precision import ROUTER_BIASES
from moee.layers.ops import expert_rows
from moee.layers.routed import NeuronLayer, RoutedLayer
from plugins.devices import Profile

Layer = TypeVar("Layer", bound=RoutedLayer)


@dataclass(frozen=True)
class WeightProblem:
    """A layer whose stored input, attribute or form is not the model's."""

    layer: str
    what: str
    message: str


@dataclass(frozen=True)
class StoredGraph:
    """A graph of the export called `name`: its plugin `nodes` by layer, its `values` by name, and its token type `dtype`, which
    the model's weights are rounded to."""

    name: str
    nodes: Mapping[str | None, ir.Node]
    values: Mapping[str | None, ir.Value]
    dtype: torch.dtype

    def node(self, layer: str, place: str) -> ir.Node | None:
        """The node `<layer>/<place>`."""
        value = self.values.get(f"{layer}/{place}")
        return value.producer() if value is not None else None


class LayerForm(ABC, Generic[Layer]):
    """A kind of layer in graphs; `name` is the kind's."""

    name: ClassVar[str]
    several: ClassVar[bool] = False  # portable forms, between which `portable` chooses

    @abstractmethod
    def apply(self, layer: Layer, tokens: Tensor, chosen: Tensor) -> Tensor:
        """The layer on tokens [T, D], of its type, with given experts [T, k]. Experts out of range add nothing."""

    def scored(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the router's last map reads of float64 tokens x [T, D], and by how much float32 may miss it, both [T, F]."""
        return x, torch.zeros_like(x)

    def title(self, plain: bool) -> str:
        """What parity calls the layer; `plain`: it is a plain MLP in the graph."""
        return "plain" if plain else self.name

    @abstractmethod
    def standard(self, name: str, layer: Layer, graph: StoredGraph) -> bool:
        """Whether the graph holds the layer `name` as standard operators, not as a plugin node."""

    def portable(self, layer: Layer, tokens: int) -> str:
        """Which of `several` portable forms the layer takes at `tokens` an image."""
        raise NotImplementedError

    @abstractmethod
    def problems(self, name: str, layer: Layer, graph: StoredGraph) -> list[WeightProblem]:
        """How what the graph stores for the layer `name` differs from the model's; empty if it does not."""

    @abstractmethod
    def milliseconds(self, device: Profile, layer: Layer, tokens: int) -> float:
        """Modelled time of the layer on `tokens` tokens."""


def by_neurons(layer: RoutedLayer, tokens: Tensor, chosen: Tensor) -> Tensor:
    """`LayerForm.apply` of layers whose experts are neurons of one store."""
    assert isinstance(layer, NeuronLayer), f"{type(layer).__name__} has no store of neurons"
    dtype = tokens.dtype
    y = torch.zeros(tokens.shape, dtype=torch.promote_types(dtype, torch.float32))
    for e, rows, kept in expert_rows(chosen, layer.neurons, layer.offsets):
        hidden = layer.activations(tokens[rows], kept)
        y[rows] += torch.addmm(layer.b_out[e], hidden, layer.w_down[kept]).to(y.dtype)
    return y.to(dtype)


def half_ulps(products: int) -> float:
    """By how much of the sum of magnitudes a float32 sum of so many products, in any order, is off at most."""
    return (products + 2) * torch.finfo(torch.float32).eps / 2


def read_by_nodes(
    name: str, expected: Mapping[str, Tensor], places: Mapping[str, str], graph: StoredGraph
) -> list[WeightProblem]:
    """Weights that plain products read, as second inputs of the nodes `<layer>/<place>`, against the `expected` ones."""
    found = []
    for part, place in places.items():
        node = graph.node(name, place)
        if node is None or len(node.inputs) != 2:
            found.append(lacks(name, part, place, graph))
            continue
        found += compare(name, part, node.inputs[1], expected[part], graph.dtype)
    return found


def lacks(name: str, part: str, place: str, graph: StoredGraph) -> WeightProblem:
    """The problem of a graph without the node that reads a weight."""
    return WeightProblem(name, part, f"{graph.name} has no node {name}/{place}, which reads {part}; export it again")


def compare(name: str, part: str, value: ir.Value | None, tensor: Tensor, dtype: torch.dtype) -> list[WeightProblem]:
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
