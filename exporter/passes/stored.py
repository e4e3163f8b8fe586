"""What passes read of a node's stored inputs, and what they leave behind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from plugins.contract import DOMAIN


def nodes_of(model: ir.Model, op_type: str) -> list[ir.Node]:
    """The nodes of one of our operators, in the graph's order."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == op_type]


def stored_inputs(node: ir.Node, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The initialisers that a node of a layer reads after its tokens, by name. Raises `ValueError` for what is none."""
    stored = {}
    for name, value in zip(names, node.inputs[1:], strict=True):
        if value is None or value.const_value is None:
            raise ValueError(f"`{node.name}`: {name} must be an initialiser to be lowered to standard operators")
        stored[name] = value.const_value.numpy()
    return stored


def drop_unused(model: ir.Model) -> None:
    """Remove the initialisers that no node reads any more."""
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
