"""A graph that takes raw pixels (0 to 255) and normalises them itself, for hosts that scale all channels alike.

DeepStream's nvinfer computes scale * (x - offset) with one scale, timm one deviation a channel; so the scaling moves into
the graph and nvinfer passes pixels on as they are.

1. input -> Sub(255 * mean) -> Mul(1 / (255 * std)) -> Cast, if the graph is not float32 -> the graph as it was.
2. The new input is float32 and has the old one's name; weights stay in the same external file.
3. With `softmax`, the output becomes probabilities: nvinfer compares them with a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from exporter.onnx_safety import load_ir


def take_raw_pixels(source: Path, target: Path, mean: Sequence[float], std: Sequence[float], softmax: bool = False) -> None:
    """Write `target`, beside `source`, from it. `mean` and `std` are of pixels in 0..1, one a channel."""
    model = load_ir(source)
    graph = model.graph
    (old,) = graph.inputs
    first = next(iter(graph))
    pixels = ir.Value(name=old.name, type=ir.TensorType(ir.DataType.FLOAT), shape=old.shape)
    values = [pixels]
    for kind, numbers in (("Sub", np.array(mean) * 255.0), ("Mul", 1.0 / (np.array(std) * 255.0))):
        label = f"pixels/{kind.lower()}"
        array = numbers.astype(np.float32).reshape(1, -1, 1, 1)
        constant = ir.Value(name=f"{label}/by", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(array.shape))
        constant.const_value = ir.tensor(array, name=constant.name)
        graph.register_initializer(constant)
        values.append(_insert(graph, first, ir.Node("", kind, [values[-1], constant], name=label)))
    if old.dtype not in (None, ir.DataType.FLOAT):
        cast = ir.Node("", "Cast", [values[-1]], [ir.AttrInt64("to", old.dtype.value)], name="pixels/cast")
        values.append(_insert(graph, first, cast))
    ir.convenience.replace_all_uses_with(old, values[-1])
    old.name = None
    graph.inputs[0] = pixels
    if softmax:
        logits = graph.outputs[0]
        name, logits.name = logits.name, f"{logits.name}/logits"
        node = ir.Node("", "Softmax", [logits], [ir.AttrInt64("axis", -1)], name="pixels/softmax")
        graph.append(node)
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, logits.type, logits.shape
        graph.outputs[0] = node.outputs[0]
    ir.save(model, target)


def _insert(graph: ir.Graph, before: ir.Node, node: ir.Node) -> ir.Value:
    node.outputs[0].name = f"{node.name}/output"
    graph.insert_before(before, node)
    return node.outputs[0]
