"""The weights and tables inside `tensorrt.onnx` against the torch model's, bit for bit: what an engine is built from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from moee.layer import RoutedFFN
from plugins.contract import DOMAIN, INPUT_NAMES, OP_TYPE


@dataclass(frozen=True)
class WeightProblem:
    """A layer whose stored input or attribute is not the model's."""

    layer: str
    what: str
    message: str


def check_weights(graph: Path, layers: dict[str, RoutedFFN], dtype: torch.dtype) -> list[WeightProblem]:
    """Compare every MoeeFfn node's stored inputs and attributes with the model's layer of its name; empty if all agree.

    `dtype` is the graph's token type: the model's weights are rounded to it, as the export does.
    """
    model = ir.load(graph)
    nodes = {n.name: n for n in model.graph if n.domain == DOMAIN and n.op_type == OP_TYPE}
    problems = [WeightProblem(n, "node", f"{graph.name} has no MoeeFfn node of this name") for n in layers if n not in nodes]
    problems += [WeightProblem(str(n), "node", "the model lacks this layer of the graph") for n in nodes if n not in layers]
    for name, layer in layers.items():
        if name in nodes:
            problems += _inputs(name, nodes[name], layer, dtype) + _attributes(name, nodes[name], layer)
    return problems


def _inputs(name: str, node: ir.Node, layer: RoutedFFN, dtype: torch.dtype) -> list[WeightProblem]:
    found = []
    for part, value in list(zip(INPUT_NAMES, node.inputs, strict=True))[1:]:
        expected = getattr(layer, part).detach()
        if expected.is_floating_point() and part != "router_bias":
            expected = expected.to(dtype)
        if value is None or value.const_value is None:
            found.append(WeightProblem(name, part, f"{part} is not stored in the graph"))
            continue
        stored = np.asarray(value.const_value.numpy())
        if stored.dtype.kind not in "fi":  # bfloat16 has a NumPy type of its own
            stored = stored.astype(np.float32)
        wanted = (expected.float() if expected.dtype == torch.bfloat16 else expected).numpy()
        if stored.shape != wanted.shape:
            found.append(WeightProblem(name, part, f"{part} has shape {stored.shape}, the model's has {wanted.shape}"))
            continue
        differ = stored != wanted
        if differ.any():
            at = tuple(int(i) for i in np.argwhere(differ)[0])
            message = f"{part}: {int(differ.sum())} of {differ.size} values differ, first at {list(at)}: "
            found.append(WeightProblem(name, part, f"{message}graph {stored[at]}, model {wanted[at]}"))
    return found


def _attributes(name: str, node: ir.Node, layer: RoutedFFN) -> list[WeightProblem]:
    came = {
        "activation": node.attributes["activation"].as_string(),
        "top_k": node.attributes["top_k"].as_int(),
        "max_width": node.attributes["max_width"].as_int(),
    }
    wanted = {"activation": layer.activation, "top_k": layer.top_k, "max_width": layer.max_width}
    return [WeightProblem(name, k, f"{k} is {v!r}, the model's is {wanted[k]!r}") for k, v in came.items() if v != wanted[k]]
