"""The int8 weights and the scales inside a graph against the model's, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from exporter.onnx_safety import load_ir
from exporter.parity.weights import WeightProblem
from exporter.quantization import QuantConv2d, Quantization, QuantLinear, quantizable, quantized


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
    """Tensors of the quantising nodes by the layer that their names begin with."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for node in load_ir(graph).graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        parts = found.setdefault((node.name or "").rpartition("/")[0], {})
        held = [v.const_value.numpy() if v is not None and v.const_value is not None else None for v in node.inputs]
        if node.op_type == "QuantizeLinear":
            given = {"input_scale": held[1], "zero_point": held[2] if len(held) > 2 else None}
        elif held[0] is not None:
            given = {"q": held[0], "scale": held[1]}
        else:  # the second half of the input's pair: must use the first one's scale
            given = {"back_scale": held[1]}
        parts |= {k: v for k, v in given.items() if v is not None}
    for parts in found.values():
        back = parts.pop("back_scale", None)
        if back is not None and not np.array_equal(back, parts.get("input_scale", np.nan)):
            parts.pop("input_scale", None)
    return found


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
