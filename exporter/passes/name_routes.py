"""Name every routed-FFN node after its module, so that later passes, parity and reports can speak of layers.

1. The i-th routed node (`MoeeFfn`, `ClearFfn`, `GatedFfn`, `LowRankFfn`) in graph order belongs to the i-th routed layer of the
   model: both follow execution order.
2. The node gets the layer's name, its output `<layer>/output`.
"""

from __future__ import annotations

import onnx_ir as ir

from exporter.passes.clear import OP_TYPE as CLEAR
from exporter.passes.gated import OP_TYPE as GATED
from exporter.passes.low_rank import OP_TYPE as LOW_RANK
from plugins.contract import DOMAIN, OP_TYPE


def name_routed_nodes(model: ir.Model, layers: list[str]) -> int:
    """Name the nodes in place; returns their number. Raises `ValueError` if there are not as many as layers."""
    nodes = [n for n in model.graph if n.domain == DOMAIN and n.op_type in (OP_TYPE, CLEAR, GATED, LOW_RANK)]
    if len(nodes) != len(layers):
        raise ValueError(f"expected {len(layers)} {OP_TYPE} nodes, found {len(nodes)}")
    for node, layer in zip(nodes, layers, strict=True):
        node.name = layer
        node.outputs[0].name = f"{layer}/output"
    return len(nodes)
