"""Lower `moee::LowRankFfn` nodes to four plain products: no plugin, no custom operator.

Rules:
1. MatMul, MatMul, Add and activation for the up map, MatMul, MatMul, Add for the down map, on x as it comes. Weights are stored
   as the products read them: up [D, r] and [r, H], down [H, r2] and [r2, D].
2. The nodes that read the weights have names (`STORED_AT`), so that verification finds the weights by where they are used. The
   first one's input is the layer's, `<layer>/result` its output. There is no `<layer>/route`: every token's is expert 0.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter.passes.activation import activation
from exporter.passes.stored import drop_unused, nodes_of, stored_inputs
from exporter.passes.tape import Tape
from moee.layers.low_rank import NAMES

OP_TYPE = "LowRankFfn"
# Each stored weight: which node `<layer>/...` reads it, as its second input.
STORED_AT = {
    "up_in": "up", "up_out": "up_outward", "up_bias": "up_shift", "down_in": "down", "down_out": "down_outward",
    "down_bias": "result",
}  # fmt: skip
FIRST = "up"


def lower_low_rank(model: ir.Model) -> list[str]:
    """Replace every `LowRankFfn` node in place; returns their names.

    Raises `ValueError` for such a node whose weights are not initialisers.
    """
    nodes = nodes_of(model, OP_TYPE)
    for node in nodes:
        _lower(model.graph, node)
    if nodes:
        drop_unused(model)
    return [node.name or "" for node in nodes]


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    stored = {
        name: np.ascontiguousarray(array.T) if name.endswith("_in") else array
        for name, array in stored_inputs(node, NAMES).items()
    }
    tape = Tape(graph, node, node.name or "moee")
    dtype = ir.tensor(stored["up_in"]).dtype
    constants = {name: tape.constant(array, name) for name, array in stored.items()}

    def product(x: ir.Value | None, side: str) -> ir.Value:
        inward, outward, bias = (f"{side}_{part}" for part in ("in", "out", "bias"))
        y = tape.op("MatMul", [x, constants[inward]], name=STORED_AT[inward])[0]
        y = tape.op("MatMul", [y, constants[outward]], name=STORED_AT[outward])[0]
        return tape.op("Add", [y, constants[bias]], name=STORED_AT[bias])[0]

    hidden = activation(tape, product(node.inputs[0], "up"), node.attributes["activation"].as_string(), dtype)
    y = product(hidden, "down")
    tape.finish(y)
