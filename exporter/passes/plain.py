"""Lower `moee::MoeeFfn` nodes of one expert to a plain MLP, as the dense graph has it: no plugin, no routing, no dispatch.

Rules:
1. MatMul, Add, activation, MatMul, Add on x as it comes. The weights are stored as the products read them, the neurons that the
   expert keeps and no others: up [D, H], its bias [H], down [H, D], output bias [D].
2. A node of several experts is left as it is.
3. The nodes that read the weights have names (`STORED_AT`), so that verification finds the weights by where they are used. The
   first one's input is the layer's, `<layer>/result` its output. There is no `<layer>/route`: every token's is expert 0.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter.passes.activation import activation
from exporter.passes.stored import drop_unused, nodes_of, stored_inputs
from exporter.passes.tape import Tape
from plugins.contract import INPUT_NAMES, OP_TYPE

# Each stored weight: which node `<layer>/...` reads it, as its second input.
STORED_AT = {"w_up": "up", "b_up": "up_bias", "w_down": "down", "b_out": "result"}
FIRST = "up"


def lower_single_experts(model: ir.Model) -> list[str]:
    """Replace every `MoeeFfn` node of one expert in place; returns their names.

    Raises `ValueError` for such a node whose weights are not initialisers.
    """
    names = []
    for node in nodes_of(model, OP_TYPE):
        router = node.inputs[INPUT_NAMES.index("router")]
        if router is not None and router.shape is not None and router.shape[0] == 1:
            _lower(model.graph, node)
            names.append(node.name or "")
    if names:
        drop_unused(model)
    return names


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    stored = stored_inputs(node, INPUT_NAMES[1:])
    kept = stored["neurons"].astype(np.int64)
    weights = {
        "w_up": np.ascontiguousarray(stored["w_up"][kept].T), "b_up": stored["b_up"][kept],
        "w_down": np.ascontiguousarray(stored["w_down"][kept]), "b_out": stored["b_out"][0],
    }  # fmt: skip
    tape = Tape(graph, node, node.name or "moee")
    dtype = ir.tensor(weights["w_up"]).dtype
    constants = {name: tape.constant(array, name) for name, array in weights.items()}
    hidden = tape.op("MatMul", [node.inputs[0], constants["w_up"]], name=STORED_AT["w_up"])[0]
    hidden = tape.op("Add", [hidden, constants["b_up"]], name=STORED_AT["b_up"])[0]
    hidden = activation(tape, hidden, node.attributes["activation"].as_string(), dtype)
    y = tape.op("MatMul", [hidden, constants["w_down"]], name=STORED_AT["w_down"])[0]
    y = tape.op("Add", [y, constants["b_out"]], name=STORED_AT["b_out"])[0]
    tape.finish(y)
