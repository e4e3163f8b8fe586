"""The int8 weights and the scales inside a graph against the model's, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from exporter.forms.form import WeightProblem
from exporter.onnx_safety import load_ir
from exporter.precision import Quantization
from exporter.quantization import QuantConv2d, QuantLinear, quantizable, quantized


def check_int8(
    graphs: Iterable[Path], model: nn.Module, quantization: Quantization, dtype: torch.dtype
) -> list[WeightProblem]:
    """Compare every dense layer of `graphs` with float32 `model`, quantised here once more with the recorded input scales; its
    scales are of type `dtype`. Nothing else may be quantised. Empty if all agree."""
    rebuilt = quantized(model, quantization.input_scales, dtype)
    wanted = {n: m for n, m in rebuilt.named_modules() if isinstance(m, (QuantLinear, QuantConv2d))}
    problems = []
    for graph in graphs:
        found = _stored(graph)
        for name in sorted(found.keys() - wanted.keys()):
            problems.append(WeightProblem(name, "int8", f"{graph.name} quantises {name}, which export.json does not name"))
        for name, layer in wanted.items():
            here = found.get(name, {})
            expected = {"q": layer.q, "scale": layer.scale, "input_scale": layer.input_scale, "zero_point": torch.tensor(0)}
            for part, tensor in expected.items():
                message = _difference(here.get(part), tensor.numpy())
                if message:
                    problems.append(WeightProblem(name, part, f"{graph.name}: int8 {part} {message}"))
    order = list(quantizable(model))
    return sorted(problems, key=lambda p: order.index(p.layer) if p.layer in order else len(order))


def _stored(graph: Path) -> dict[str, dict[str, np.ndarray]]:
    """Tensors of the quantising nodes by the layer that their names begin with. Layers that read one input with one scale may
    share its pair of nodes, which then has the first one's name: the others' is looked up at their product."""
    found: dict[str, dict[str, np.ndarray]] = {}
    shared: dict[str, ir.Node] = {}
    for node in load_ir(graph).graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        parts = found.setdefault((node.name or "").rpartition("/")[0], {})
        held = _held(node)
        if node.op_type == "QuantizeLinear":
            given = {"input_scale": held[1], "zero_point": held[2] if len(held) > 2 else None}
        elif held[0] is not None:
            given = {"q": held[0], "scale": held[1]}
            shared[(node.name or "").rpartition("/")[0]] = node
        else:  # the second half of the input's pair: must use the first one's scale
            given = {"back_scale": held[1]}
        parts |= {k: v for k, v in given.items() if v is not None}
    for parts in found.values():
        back = parts.pop("back_scale", None)
        if back is not None and not np.array_equal(back, parts.get("input_scale", np.nan)):
            parts.pop("input_scale", None)
    for name, node in shared.items():
        if "input_scale" not in found[name] and "zero_point" not in found[name]:
            found[name] |= _input_of_product(node)
    return found


def _held(node: ir.Node) -> list[np.ndarray | None]:
    """The constants among a node's inputs."""
    return [v.const_value.numpy() if v is not None and v.const_value is not None else None for v in node.inputs]


def _input_of_product(weight: ir.Node) -> dict[str, np.ndarray]:
    """Scale and zero point of the quantised input of the product that uses the weight which `weight` makes a float of; empty if
    its two halves differ."""
    value = weight.outputs[0]
    users = [use.node for use in value.uses()]
    while len(users) == 1 and users[0].op_type == "Transpose":
        value = users[0].outputs[0]
        users = [use.node for use in value.uses()]
    if len(users) != 1 or users[0].op_type not in ("MatMul", "Gemm", "Conv") or users[0].inputs[0] is None:
        return {}
    back = users[0].inputs[0].producer()
    if back is None or back.op_type != "DequantizeLinear" or back.inputs[0] is None:
        return {}
    first = back.inputs[0].producer()
    if first is None or first.op_type != "QuantizeLinear":
        return {}
    scale, zero = (*_held(first)[1:], None)[:2]
    again = _held(back)[1]
    if scale is None or zero is None or again is None or not np.array_equal(scale, again):
        return {}
    return {"input_scale": scale, "zero_point": zero}


def _difference(stored: np.ndarray | None, wanted: np.ndarray) -> str:
    if stored is None:
        return "is not stored in the graph"
    if stored.shape != wanted.shape:
        return f"has shape {stored.shape}, the model's has {wanted.shape}"
    differ = np.asarray(stored != wanted)
    if not differ.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(differ)[0])
    return f"differs in {int(differ.sum())} of {differ.size} values, first at {list(at)}: graph {stored[at]}, model {wanted[at]}"
