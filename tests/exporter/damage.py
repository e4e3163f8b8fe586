"""Damage planted in an exported folder, as a wrong exporter or a bad copy would leave it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from exporter.passes.clear import STORED_AT
from plugins.contract import INPUT_NAMES, OP_TYPE
from tests.exporter.conftest import rehash

Change = Callable[[np.ndarray], np.ndarray]


def change_store(folder: Path, layer: str, part: str, change: Change) -> None:
    """Change one of a layer's operator inputs where it is stored: in `moee.data` for both graphs, or in each graph."""
    tensorrt = onnx.load(folder / "tensorrt.onnx", load_external_data=False)
    name = _stored_name(tensorrt, layer, part)
    for graph in ("tensorrt.onnx", "portable.onnx"):
        model = onnx.load(folder / graph, load_external_data=False)
        tensor = next((t for t in model.graph.initializer if t.name == name), None)
        if tensor is None:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            if graph == "tensorrt.onnx":  # the portable graph reads the same bytes
                _external(folder, tensor, change)
            continue
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
        onnx.save(model, folder / graph)
    rehash(folder)


def _stored_name(tensorrt: onnx.ModelProto, layer: str, part: str) -> str:
    """Initialiser of an operator input: at its MoeeFfn node, or where a CLEAR-MoE layer reads it."""
    nodes = {n.name: n for n in tensorrt.graph.node}
    if layer in nodes:
        assert nodes[layer].op_type == OP_TYPE
        return nodes[layer].input[INPUT_NAMES.index(part)]
    place, position = STORED_AT[part]
    return nodes[f"{layer}/{place}"].input[position]


def _external(folder: Path, tensor: onnx.TensorProto, change: Change) -> None:
    where = ExternalDataInfo(tensor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    data = bytearray((folder / where.location).read_bytes())
    start, length = where.offset or 0, where.length
    array = np.frombuffer(bytes(data[start : start + length]), dtype).reshape(tensor.dims)
    data[start : start + length] = np.ascontiguousarray(change(array.copy()).astype(dtype)).tobytes()
    (folder / where.location).write_bytes(data)


def change_weight(folder: Path, graph: str, name: str) -> None:
    """Add 1 to the first number of an initialiser of one graph, wherever it is stored."""
    model = onnx.load(folder / graph)
    weight = next(i for i in model.graph.initializer if i.name == name)
    changed = numpy_helper.to_array(weight).copy()
    changed.reshape(-1)[0] += 1
    weight.CopyFrom(numpy_helper.from_array(changed, name))
    onnx.save(model, folder / graph)
    rehash(folder)


def change_constants(folder: Path, change: Callable[[dict[str, np.ndarray]], None], graph: str = "portable.onnx") -> None:
    """Change small constants of one graph in place; they are given by name."""
    model = onnx.load(folder / graph, load_external_data=False)
    stored = {t.name: t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL}
    arrays = {name: numpy_helper.to_array(t).copy() for name, t in stored.items()}
    before = {name: array.copy() for name, array in arrays.items()}
    change(arrays)
    changed = [n for n in arrays if arrays[n].shape != before[n].shape or (arrays[n] != before[n]).any()]
    assert changed, "nothing was damaged"
    for name in changed:
        stored[name].CopyFrom(numpy_helper.from_array(arrays[name], name))
    onnx.save(model, folder / graph)
    rehash(folder)


def flip_largest(w: np.ndarray) -> np.ndarray:
    """The sign of the largest weight changed."""
    at = np.unravel_index(np.abs(w).argmax(), w.shape)
    w[at] = -w[at]
    return w
