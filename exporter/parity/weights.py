"""The weights and tables inside `tensorrt.onnx` against the torch model's, bit for bit: what an engine is built from.

Each kind of layer says where its weights are (`exporter.forms.form`). Those of what is no MoeeFfn node are found at the nodes
that use them, so a weight of another layer in the right shape is noticed too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from exporter.forms.form import StoredGraph, WeightProblem
from exporter.forms.registry import form_of
from exporter.onnx_safety import load_ir
from moee.layers.routed import RoutedLayer
from plugins.contract import DOMAIN, OP_TYPE


def stored_graph(graph: Path, dtype: torch.dtype) -> StoredGraph:
    """What the file `graph`, of token type `dtype`, holds."""
    model = load_ir(graph)
    nodes = {n.name: n for n in model.graph if n.domain == DOMAIN and n.op_type == OP_TYPE}
    return StoredGraph(graph.name, nodes, {v.name: v for n in model.graph for v in n.outputs}, dtype)


def check_weights(graph: Path, layers: Mapping[str, RoutedLayer], dtype: torch.dtype) -> list[WeightProblem]:
    """Compare what the graph stores for every layer with the model's layer of its name; empty if all agree.

    `dtype` is the graph's token type: the model's weights are rounded to it, as the export does.
    """
    stored = stored_graph(graph, dtype)
    strangers = [name for name in stored.nodes if name not in layers]
    problems = [WeightProblem(str(name), "node", "the model lacks this layer of the graph") for name in strangers]
    for name, layer in layers.items():
        problems += form_of(layer).problems(name, layer, stored)
    return problems
