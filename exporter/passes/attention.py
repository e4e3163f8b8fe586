"""Attention as one would write it by hand: what the tracer makes of `qkv.unbind(0)` and `q @ k.T` copies every tensor twice.

Rules (x [B, N, C], H heads of d; timm's `Attention` and Swin's `WindowAttention` after tracing):
1. One product for query, key and value, its result reshaped to [B, N, 3, H, d], permuted to [3, B, H, N, d] and sliced, becomes
   three products with a third of the weight each, reshaped to [B, N, H, d] and permuted to [B, H, N, d]. Each output element
   is the same dot product as before.
2. A key that is transposed by way of a reshape to three dimensions, with shapes computed at run time, becomes one Transpose.
3. Two Transposes in a row become one.

A node that does not match, or whose intermediate values are used elsewhere, is left as it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

QKV_PERM = (2, 0, 3, 1, 4)
HEADS_FIRST = (0, 2, 1, 3)
LAST_TWO = (0, 1, 3, 2)


def rewrite_attention(model: ir.Model) -> tuple[int, int]:
    """Apply the rules in place; returns how many qkv products were split and how many keys got a plain Transpose."""
    graph = model.graph
    split = sum(_split_qkv(graph, node) for node in list(graph) if node.op_type == "Transpose" and _perm(node) == QKV_PERM)
    keys = sum(_transpose_key(graph, node) for node in list(graph) if node.op_type == "Transpose" and _perm(node) == (0, 2, 1))
    for node in list(graph):
        if node.op_type == "Transpose":
            _merge_transposes(graph, node)
    _remove_dead(graph)
    return split, keys


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()


def _only_user(value: ir.Value, kind: str) -> ir.Node | None:
    """The node that alone uses `value`, if it is of this kind and the value is no output of the graph."""
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == kind and not value.is_graph_output() else None


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def _array(value: ir.Value | None) -> np.ndarray | None:
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def _constant(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(name=name, type=ir.TensorType(ir.tensor(array).dtype), shape=ir.Shape(array.shape))
    value.const_value = ir.tensor(array, name=name)
    graph.register_initializer(value)
    return value


def _node(graph: ir.Graph, before: ir.Node, kind: str, inputs: Sequence[ir.Value | None], name: str, **attributes) -> ir.Value:
    node = ir.Node("", kind, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1, name=name)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node.outputs[0]


def _split_qkv(graph: ir.Graph, permute: ir.Node) -> bool:
    """Rule 1."""
    reshape = _producer(permute.inputs[0], "Reshape")
    add = _producer(reshape.inputs[0], "Add") if reshape else None
    product = _producer(add.inputs[0], "MatMul") if add else None
    if reshape is None or add is None or product is None:
        return False
    shape, weight, bias = _array(reshape.inputs[1]), _array(product.inputs[1]), _array(add.inputs[1])
    parts = _unbound(permute.outputs[0])
    chain = (product.outputs[0], add.outputs[0], reshape.outputs[0])
    if shape is None or weight is None or bias is None or parts is None or len(shape) != 5 or shape[2] != 3:
        return False
    if any(len(value.uses()) != 1 or value.is_graph_output() for value in chain):
        return False
    dim = weight.shape[1] // 3
    wanted = np.array([shape[0], shape[1], shape[3], shape[4]], np.int64)
    scope, x = (product.name or "qkv").rsplit("/", 1)[0], product.inputs[0]
    for part, letter, old in zip(range(3), "qkv", parts, strict=True):
        columns = slice(part * dim, (part + 1) * dim)
        name = f"{scope}.{letter}"
        w = _constant(graph, np.ascontiguousarray(weight[:, columns]), f"{name}.weight")
        b = _constant(graph, np.ascontiguousarray(bias[columns]), f"{name}.bias")
        flat = _node(graph, product, "Add", [_node(graph, product, "MatMul", [x, w], f"{name}/product"), b], f"{name}/linear")
        heads = _node(graph, product, "Reshape", [flat, _constant(graph, wanted, f"{scope}.heads")], f"{name}/heads")
        new = _node(graph, product, "Transpose", [heads], f"{name}/heads_first", perm=list(HEADS_FIRST))
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new)
    return True


def _unbound(stacked: ir.Value) -> list[ir.Value] | None:
    """The three values [B, H, N, d] that are sliced from [3, B, H, N, d], in order."""
    found: dict[int, ir.Value] = {}
    for use in stacked.uses():
        if use.node.op_type == "Split":
            squeezed = [_only_user(v, "Squeeze") for v in use.node.outputs]
            return [s.outputs[0] for s in squeezed if s is not None] if len(squeezed) == 3 and all(squeezed) else None
        start, end, axis = (_array(v) for v in use.node.inputs[1:4]) if use.node.op_type == "Slice" else (None, None, None)
        squeeze = _only_user(use.node.outputs[0], "Squeeze")
        if start is None or end is None or axis is None or squeeze is None or axis.tolist() != [0] or end[0] != start[0] + 1:
            return None
        found[int(start[0])] = squeeze.outputs[0]
    return [found[i] for i in range(3)] if sorted(found) == [0, 1, 2] and len(stacked.uses()) == 3 else None


def _transpose_key(graph: ir.Graph, swap: ir.Node) -> bool:
    """Rule 2."""
    before, after = _producer(swap.inputs[0], "Reshape"), _only_user(swap.outputs[0], "Reshape")
    if before is None or after is None or len(before.outputs[0].uses()) != 1:
        return False
    key, result = before.inputs[0], after.outputs[0]
    if key is None or key.shape is None or len(key.shape) != 4 or result.shape is None or len(result.shape) != 4:
        return False
    if not (_from_shape_of(before.inputs[1], key) and _from_shape_of(after.inputs[1], key)):
        return False
    new = _node(graph, swap, "Transpose", [key], f"{swap.name}/key", perm=list(LAST_TWO))
    new.type, new.shape = key.type, ir.Shape([key.shape[i] for i in LAST_TWO])
    ir.convenience.replace_all_uses_with(result, new)
    return True


def _from_shape_of(wanted: ir.Value | None, key: ir.Value) -> bool:
    """Whether a computed shape is a Concat of slices of `key`'s own shape (and constants)."""
    concat = _producer(wanted, "Concat")
    if concat is None:
        return False
    for value in concat.inputs:
        if _array(value) is not None:
            continue
        part = _producer(value, "Slice")
        source = _producer(part.inputs[0], "Shape") if part else None
        if source is None or source.inputs[0] is not key:
            return False
    return True


def _merge_transposes(graph: ir.Graph, node: ir.Node) -> None:
    """Rule 3: `node` reads another Transpose's result."""
    first = _producer(node.inputs[0], "Transpose")
    if first is None:
        return
    inner, outer = _perm(first), _perm(node)
    if len(inner) != len(outer) or not inner:
        return
    node.replace_input_with(0, first.inputs[0])
    node.attributes["perm"] = ir.AttrInt64s("perm", [inner[i] for i in outer])


def _remove_dead(graph: ir.Graph) -> None:
    """Nodes and initialisers that nothing uses any more."""
    for node in reversed(list(graph)):
        if all(not v.uses() and not v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    for name in [n for n, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]:
        del graph.initializers[name]
