"""Lower `moee::GatedFfn` nodes to the plain products of a gated MLP, as the dense graph has them: no plugin, no custom operator.

Rules:
1. MatMul, Add and activation for the gate, MatMul and Add for the up map, Mul, MatMul, Add on x as it comes. Weights are stored
   as the products read them: gate and up [D, U], down [U, D].
2. The nodes that read the weights have names (`STORED_AT`), so that verification finds the weights by where they are used. Inputs
   of `READERS` are the layer's, `<layer>/result` is its output.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter.passes.activation import activation
from exporter.passes.stored import drop_unused, nodes_of, stored_inputs
from exporter.passes.tape import Tape
from moee.mlps.gated import NAMES

OP_TYPE = "GatedFfn"
# Each stored weight: which node `<layer>/...` reads it, as its second input.
STORED_AT = {
    "w_gate": "gate", "b_gate": "gate_bias", "w_up": "up", "b_up": "up_bias", "w_down": "down", "b_out": "result",
}  # fmt: skip
READERS = ("gate", "up")  # of the tokens


def lower_gated(model: ir.Model) -> list[str]:
    """Replace every `GatedFfn` node in place; returns their names.

    Raises `ValueError` for such a node whose weights are not initialisers.
    """
    nodes = nodes_of(model, OP_TYPE)
    for node in nodes:
        _lower(model.graph, node)
    if nodes:
        drop_unused(model)
    return [node.name or "" for node in nodes]


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    stored = stored_inputs(node, NAMES)
    weights = {
        **stored, "w_gate": np.ascontiguousarray(stored["w_gate"].T), "w_up": np.ascontiguousarray(stored["w_up"].T),
        "b_out": stored["b_out"][0],
    }  # fmt: skip
    tape = Tape(graph, node, node.name or "moee")
    dtype = ir.tensor(weights["w_up"]).dtype
    constants = {name: tape.constant(array, name) for name, array in weights.items()}

    def product(x: ir.Value | None, weight: str, bias: str) -> ir.Value:
        y = tape.op("MatMul", [x, constants[weight]], name=STORED_AT[weight])[0]
        return tape.op("Add", [y, constants[bias]], name=STORED_AT[bias])[0]

    gate = product(node.inputs[0], "w_gate", "b_gate")
    kind = node.attributes["activation"].as_string()
    gate = tape.op("Sigmoid", [gate])[0] if kind == "sigmoid" else activation(tape, gate, kind, dtype)
    hidden = tape.op("Mul", [gate, product(node.inputs[0], "w_up", "b_up")])[0]
    y = product(hidden, "w_down", "b_out")
    tape.finish(y)
