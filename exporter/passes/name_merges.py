"""Name what a block's token merging reads and chooses, so that parity can see it.

1. The nodes of a block's merge carry its name. The first product with a stored weight makes the keys: its input becomes
   `<block>/merge_tokens`, its result `<block>/merge_keys`.
2. `ArgMax` gives `<block>/merge_best`, the first `TopK` of the largest `<block>/merge_order`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

TOKENS, KEYS, BEST, ORDER = "merge_tokens", "merge_keys", "merge_best", "merge_order"


def name_merges(model: ir.Model, blocks: Sequence[str]) -> None:
    """Name the values in place. Raises `ValueError` for a block whose merge is not in the graph."""
    for block in blocks:
        nodes = [node for node in model.graph if (node.name or "").startswith(f"{block}.merge/")]
        product = _first(nodes, block, lambda node: node.op_type == "MatMul" and _stored(node.inputs[1]))
        best = _first(nodes, block, lambda node: node.op_type == "ArgMax")
        order = _first(nodes, block, lambda node: node.op_type == "TopK")
        given = product.inputs[0]
        assert given is not None, "a product has two inputs"
        named = {TOKENS: given, KEYS: product.outputs[0], BEST: best.outputs[0], ORDER: order.outputs[1]}
        for part, value in named.items():
            value.name = f"{block}/{part}"


def _first(nodes: Sequence[ir.Node], block: str, wanted: Callable[[ir.Node], bool]) -> ir.Node:
    found = next((node for node in nodes if wanted(node)), None)
    if found is None:
        raise ValueError(f"the graph lacks a part of the token merging of {block}")
    return found


def _stored(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None
