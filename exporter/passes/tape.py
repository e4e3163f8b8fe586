"""Appending the nodes of one lowered layer to a graph, or to a branch of an `If` in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir


class Tape:
    """Puts nodes before the node that they replace; names of nodes, values and constants begin with the layer's."""

    def __init__(self, graph: ir.Graph, before: ir.Node, prefix: str):
        self.graph, self.before, self.prefix, self.count = graph, before, prefix, 0
        self._branch: list[ir.Node] | None = None

    def op(self, kind: str, inputs: Sequence[ir.Value | None], outputs: int = 1, name: str = "", **attributes) -> list[ir.Value]:
        """Append a node of a standard operator, and return its outputs."""
        self.count += 1
        label = f"{self.prefix}/{name or f'{kind}_{self.count}'}"
        converted = ir.convenience.convert_attributes(attributes)
        node = ir.Node("", kind, inputs, converted, num_outputs=outputs, name=label)
        for position, value in enumerate(node.outputs):
            value.name = label if outputs == 1 else f"{label}:{position}"
        self.place(node)
        return list(node.outputs)

    def place(self, node: ir.Node) -> None:
        """Append a node to the branch that is being written, else to the graph."""
        if self._branch is None:
            self.graph.insert_before(self.before, node)
        else:
            self._branch.append(node)

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """An initialiser of the main graph, which branches see too: the one of this name if it holds the same array, else one
        with a number after the name."""
        first = f"{self.prefix}/{name}"
        for number in itertools.count():
            label = f"{first}:{number}" if number else first
            stored = self.graph.initializers.get(label)
            if stored is None:
                break
            if stored.const_value is not None and _same(stored.const_value.numpy(), array):
                return stored
        value = ir.Value(name=label, type=ir.TensorType(ir.tensor(array).dtype), shape=ir.Shape(array.shape))
        value.const_value = ir.tensor(array, name=label)
        self.graph.register_initializer(value)
        return value

    def finish(self, result: ir.Value) -> None:
        """`result` takes the place of the output of the node that is replaced, and that node goes."""
        old = self.before.outputs[0]
        result.type, result.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        self.graph.remove(self.before, safe=True)

    @contextmanager
    def branch(self) -> Iterator[list[ir.Node]]:
        """Nodes made inside go to the list instead of the graph."""
        assert self._branch is None, "branches are not nested"
        self._branch = []
        try:
            yield self._branch
        finally:
            self._branch = None

    def choose(self, condition: ir.Value, then: ir.Graph, otherwise: ir.Graph, name: str) -> ir.Value:
        """An `If` with one output."""
        attributes = [ir.AttrGraph("then_branch", then), ir.AttrGraph("else_branch", otherwise)]
        node = ir.Node("", "If", [condition], attributes, num_outputs=1, name=f"{self.prefix}/{name}")
        node.outputs[0].name = f"{self.prefix}/{name}"
        self.place(node)
        return node.outputs[0]


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and np.array_equal(one, other)
