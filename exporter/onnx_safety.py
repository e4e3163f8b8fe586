"""Checks on an ONNX file before anything executes or converts it: an export folder may come from someone else.

1. Protobuf decodes, and no field nests deeper than the decoder allows.
2. External data: a relative name in the file's own folder, an ordinary file and no symbolic or hard link, each key once, offset
   and length within the file and equal to the tensor's size.
3. Initialisers: known type, no negative dimension, stored bytes as many as the shape says; no sparse tensors.
4. Nodes: operators that the ONNX standard knows and `moee::MoeeFfn` alone, no loops, each input made before it is used (hence no
   cycle), no name made twice.
5. `MoeeFfn`: inputs and attributes as the contract says, none beside them; offsets rising from 0 to the number of neurons,
   neuron ids ascending within the store, a router of finite numbers.
6. Operator sets that are known here, no later version.

What a graph computes is its author's affair: one may take any memory and time when it runs.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from moee.errors import UserError
from moee.schema import reason_of
from moee.store.artifact import stays_inside
from plugins.contract import ACTIVATIONS, ATTRIBUTES, DOMAIN, INPUT_NAMES, LOAD_UNIT, OP_TYPE

MAX_FILE_BYTES = 2**31 - 1  # protobuf's own limit
MAX_RANK = 16
MAX_NESTING = 4  # of branches
BRANCH = "If"
MAX_REASON = 500  # characters
IN_MEMORY = "_ORT_MEM_ADDR_"  # in a location, ONNX Runtime takes the offset for an address of its own process
EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}
OPSET = 1  # of the plugin's domain, the only version that there is
KINDS = {"string": onnx.AttributeProto.STRING, "int": onnx.AttributeProto.INT, "ints": onnx.AttributeProto.INTS}
TABLES = {"neurons": 1, "offsets": 1, "w_up": 2, "router": 2}


class _Refused(Exception):
    """Why a file is refused; `check_onnx` says which file."""


def check_onnx(path: Path | str) -> onnx.ModelProto:
    """The model without its external data. Raises `UserError`, one sentence, for a file that breaks a rule above."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _Refused("it is larger than a protobuf file can be")
        model = onnx.load(str(path), load_external_data=False)
        _check(model, path.parent)
    except _Refused as error:
        raise UserError(f"{path} is refused: {_reason(error)}; export it again, or do not use it") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); export it again") from error
    except Exception as error:  # protobuf's decode errors share no base class with onnx's own
        raise UserError(f"{path} is not a readable ONNX file ({_reason(error)}); export it again") from error
    return model


def load_ir(path: Path | str) -> ir.Model:
    """The graph for rewriting, checked first; its weights stay in their files. Raises `UserError` as `check_onnx` does."""
    check_onnx(path)
    try:
        return ir.load(path)
    except Exception as error:  # onnx_ir raises many kinds for what it cannot represent
        raise UserError(f"{path} cannot be taken apart ({_reason(error)}); export it again") from error


def _reason(error: Exception) -> str:
    """It quotes names from the file, which may hold anything."""
    return reason_of(error, MAX_REASON)


def _check(model: onnx.ModelProto, folder: Path) -> None:
    if not model.HasField("graph") or not model.graph.output:
        raise _Refused("it holds no graph")
    if model.functions:
        raise _Refused("it defines functions of its own, which would shadow the plugin")
    if model.training_info:
        raise _Refused("it holds training graphs, which nothing here reads")
    for opset in model.opset_import:
        newest = {"": onnx.defs.onnx_opset_version(), "ai.onnx": onnx.defs.onnx_opset_version(), DOMAIN: OPSET}.get(opset.domain)
        if newest is None:
            raise _Refused(f"it needs operators of {opset.domain!r}")
        if not 1 <= opset.version <= newest:
            raise _Refused(f"it needs version {opset.version} of the operators of {opset.domain or 'ONNX'}; known is {newest}")
    rules = onnx.checker.C.CheckerContext()
    rules.ir_version, rules.opset_imports = model.ir_version, {opset.domain: opset.version for opset in model.opset_import}
    _check_graph(model.graph, folder, rules, [])


def _check_graph(graph: onnx.GraphProto, folder: Path, rules: Any, outer: list[set[str]]) -> None:
    """`outer` are the names that the graphs around this one have made so far; branches see them."""
    if len(outer) > MAX_NESTING:
        raise _Refused("its branches nest too deep")
    if graph.sparse_initializer:
        raise _Refused("it holds sparse tensors")
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    if len(tensors) != len(graph.initializer):
        raise _Refused("an initialiser stands twice")
    for tensor in graph.initializer:
        _check_tensor(tensor, folder)
    known = set(tensors) | {value.name for value in graph.input}
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) != (DOMAIN, OP_TYPE):
            raise _Refused(f"operator {node.domain}::{node.op_type} is unknown")
        missing = [name for name in node.input if name and not any(name in scope for scope in (known, *outer))]
        if missing:
            raise _Refused(f"node {node.name!r} uses {missing[0]!r} before it is made")
        for attribute in node.attribute:
            if attribute.sparse_tensors or attribute.HasField("sparse_tensor"):
                raise _Refused("it holds sparse tensors")
            if attribute.graphs or (attribute.HasField("g") and node.op_type != BRANCH):
                raise _Refused(f"node {node.name!r} is a loop, which no export has")
            if attribute.HasField("g"):
                _check_graph(attribute.g, folder, rules, [*outer, known])
            for tensor in [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])]:
                _check_tensor(tensor, folder)
        if node.op_type == OP_TYPE:
            _check_experts(node, tensors, folder)
        elif node.op_type != BRANCH or len(node.attribute) != 2 or not all(a.HasField("g") for a in node.attribute):
            _check_schema(node, rules)
        made = [name for name in node.output if name]
        if len(set(made)) != len(made) or any(name in scope for scope in (known, *outer) for name in made):
            raise _Refused(f"node {node.name!r} makes a value that exists already")
        known |= set(made)
    unmade = [value.name for value in graph.output if not any(value.name in scope for scope in (known, *outer))]
    if unmade:
        raise _Refused(f"output {unmade[0]!r} is never made")


def _check_schema(node: onnx.NodeProto, rules: Any) -> None:
    """Operator, attributes and number of inputs as the standard has them."""
    try:
        onnx.checker.check_node(node, rules)
    except onnx.checker.ValidationError as error:
        raise _Refused(f"node {node.name!r}: {error}") from error


def _element_bits(tensor: TensorProto) -> int:
    try:
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except (KeyError, TypeError, ValueError) as error:
        raise _Refused(f"tensor {tensor.name!r} has the unknown type {tensor.data_type}") from error
    if kind == np.dtype(object):
        raise _Refused(f"tensor {tensor.name!r} holds strings")
    return {"int4": 4, "uint4": 4, "float4e2m1": 4, "int2": 2, "uint2": 2}.get(kind.name.replace("_", ""), 8 * kind.itemsize)


def _check_tensor(tensor: TensorProto, folder: Path) -> None:
    if len(tensor.dims) > MAX_RANK or any(d < 0 for d in tensor.dims):
        raise _Refused(f"tensor {tensor.name!r} has the shape {list(tensor.dims)[:MAX_RANK]}")
    size = -(-prod(tensor.dims) * _element_bits(tensor) // 8)
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_external(tensor, folder, size)
    elif tensor.HasField("raw_data"):
        if len(tensor.raw_data) != size:
            raise _Refused(f"tensor {tensor.name!r} holds {len(tensor.raw_data)} bytes, its shape needs {size}")
    elif size > tensor.ByteSize() * 8:  # the typed fields: a varint of one byte may stand for eight
        raise _Refused(f"tensor {tensor.name!r} holds fewer values than its shape needs")


def _check_external(tensor: TensorProto, folder: Path, size: int) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    where = f"tensor {tensor.name!r} has its data in {location!r}"
    if len(entries) != len(tensor.external_data) or entries.keys() - EXTERNAL_KEYS:  # readers differ in which one they take
        raise _Refused(f"{where}, and says a part of it twice or more than its place")
    if not location or "\\" in location or IN_MEMORY in location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise _Refused(f"{where}, which is no name in the file's own folder")
    path = folder / location
    if not stays_inside(folder, location):
        raise _Refused(f"{where}, which is a link, or no name of a file")
    if not path.is_file():
        raise _Refused(f"{where}, which is missing")
    found = path.stat()
    if found.st_nlink > 1:
        raise _Refused(f"{where}, which has another name elsewhere (a hard link; copy the file)")
    offset = _number(entries.get("offset", "0"), where)
    length = _number(entries.get("length", str(found.st_size - offset)), where)
    if length != size or offset + length > found.st_size:
        raise _Refused(f"{where}, bytes {offset} to {offset + length}: the file or the shape does not fit")


def _number(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):  # Python's int also takes signs, spaces and underscores
        raise _Refused(f"{where} at an offset or of a length that is no number")
    return int(text)


def _check_experts(node: onnx.NodeProto, tensors: dict[str, TensorProto], folder: Path) -> None:
    name = node.name or OP_TYPE
    if len(node.input) != len(INPUT_NAMES) or len(node.output) != 1:
        raise _Refused(f"{name} has {len(node.input)} inputs and {len(node.output)} outputs")
    given = dict(zip(INPUT_NAMES, node.input, strict=True))
    parts = {}
    for part, rank in TABLES.items():
        tensor = tensors.get(given[part])
        if tensor is None or len(tensor.dims) != rank:
            raise _Refused(f"{name}: {part} must be an initialiser of rank {rank}")
        parts[part] = tensor
    if any(parts[part].data_type != TensorProto.INT32 for part in ("neurons", "offsets")):
        raise _Refused(f"{name}: neurons and offsets must be int32")
    attributes = _attributes(node, name)
    experts, union = parts["router"].dims[0], parts["w_up"].dims[0]
    # as int64: differences of int32 may wrap round
    neurons, offsets = (numpy_helper.to_array(parts[part], str(folder)).astype(np.int64) for part in ("neurons", "offsets"))
    if len(offsets) != experts + 1 or offsets[0] != 0 or offsets[-1] != len(neurons) or (np.diff(offsets) < 0).any():
        raise _Refused(f"{name}: offsets do not rise from 0 to {len(neurons)} in {experts} steps")
    if len(neurons) and (neurons.min() < 0 or neurons.max() >= union):
        raise _Refused(f"{name}: a neuron id lies outside 0..{union - 1}")
    falls = np.flatnonzero(np.diff(neurons) <= 0) + 1
    if not np.isin(falls, offsets).all():
        raise _Refused(f"{name}: an expert's neuron ids do not ascend")
    for part in ("router", "router_bias"):  # as small as the tables; NaN would send every token to the first expert
        tensor = tensors.get(given[part])
        if tensor is not None and not np.isfinite(numpy_helper.to_array(tensor, str(folder)).astype(np.float32)).all():
            raise _Refused(f"{name}: {part} holds numbers that are not finite")
    top_k, width, load = attributes["top_k"], attributes["max_width"], attributes["load"]
    if not 1 <= top_k <= experts:
        raise _Refused(f"{name}: top_k {top_k!r} with {experts} experts")
    if attributes["activation"] not in ACTIVATIONS:
        raise _Refused(f"{name}: activation {attributes['activation']!r}; known are {', '.join(ACTIVATIONS)}")
    if len(load) not in (0, experts) or any(not 0 <= part <= LOAD_UNIT for part in load):
        raise _Refused(f"{name}: load must be {experts} numbers from 0 to {LOAD_UNIT}, or none")
    if width != int(np.diff(offsets).max()):
        raise _Refused(f"{name}: max_width {width!r}, its widest expert has {int(np.diff(offsets).max())} neurons")


def _attributes(node: onnx.NodeProto, name: str) -> dict[str, Any]:
    """The attributes of a MoeeFfn with the contract's defaults. Refused: one that it does not know, of another type, or twice."""
    known = {attribute.name: attribute for attribute in ATTRIBUTES}
    found: dict[str, Any] = {}
    for given in node.attribute:
        wanted = known.get(given.name)
        if wanted is None or given.name in found:
            raise _Refused(f"{name}: attribute {given.name!r} is {'unknown' if wanted is None else 'given twice'}")
        if given.type != KINDS[wanted.kind]:
            raise _Refused(f"{name}: attribute {given.name!r} is not of the type {wanted.kind}")
        value = helper.get_attribute_value(given)
        found[given.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    missing = [each.name for each in ATTRIBUTES if each.default is None and each.name not in found]
    if missing:
        raise _Refused(f"{name}: attribute {missing[0]!r} is missing")
    return {**{each.name: each.default for each in ATTRIBUTES}, **found}
