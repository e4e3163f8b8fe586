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

import itertools

import numpy as np
import onnx_ir as ir

from exporter.passes.tape import Tape

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
            _merge_transposes(node)
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


def _ints(value: ir.Value | None) -> list[int]:
    """A constant list of numbers; empty for anything else."""
    array = _array(value)
    return [] if array is None else array.reshape(-1).tolist()


def _split_qkv(graph: ir.Graph, permute: ir.Node) -> bool:
    """Rule 1."""
    reshape = _producer(permute.inputs[0], "Reshape")
    add = _producer(reshape.inputs[0], "Add") if reshape else None
    product = _producer(add.inputs[0], "MatMul") if add else None
    if reshape is None or add is None or product is None:
        return False
    shape, weight, bias = _ints(reshape.inputs[1]), _array(product.inputs[1]), _array(add.inputs[1])
    parts = _unbound(permute.outputs[0])
    if len(shape) != 5 or shape[2] != 3 or weight is None or bias is None or parts is None:
        return False
    dim = shape[3] * shape[4]
    if weight.ndim != 2 or weight.shape[1] != 3 * dim or bias.shape != (3 * dim,):
        return False
    if any(len(v.uses()) != 1 or v.is_graph_output() for v in (product.outputs[0], add.outputs[0], reshape.outputs[0])):
        return False
    scope = _free(graph, (product.name or "qkv").rsplit("/", 1)[0])
    for part, (letter, old) in enumerate(zip("qkv", parts, strict=True)):
        tape = Tape(graph, product, f"{scope}.{letter}")
        columns = slice(part * dim, (part + 1) * dim)
        w = tape.constant(np.ascontiguousarray(weight[:, columns]), "weight")
        b = tape.constant(np.ascontiguousarray(bias[columns]), "bias")
        by_head = tape.constant(np.array([shape[0], shape[1], shape[3], shape[4]], np.int64), "shape")
        linear = tape.op("Add", [tape.op("MatMul", [product.inputs[0], w], name="product")[0], b], name="linear")[0]
        heads = tape.op("Reshape", [linear, by_head], name="heads")[0]
        new = tape.op("Transpose", [heads], name="heads_first", perm=list(HEADS_FIRST))[0]
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new)
    return True


def _free(graph: ir.Graph, scope: str) -> str:
    """The scope, numbered if an earlier product in it was split: several may lie in one module, or in none that is known."""
    taken = {(node.name or "").split("/", 1)[0] for node in graph}
    numbered = (f"{scope}.{number}" if number else scope for number in itertools.count())
    return next(name for name in numbered if f"{name}.q" not in taken)


def _unbound(stacked: ir.Value) -> list[ir.Value] | None:
    """The three values [B, H, N, d] that are sliced from [3, B, H, N, d], in order."""
    found: dict[int, ir.Value] = {}
    for use in stacked.uses():
        if use.node.op_type != "Slice":
            return None
        starts, ends, axes = (_ints(v) for v in use.node.inputs[1:4])
        squeeze = _only_user(use.node.outputs[0], "Squeeze")
        if len(starts) != 1 or ends != [starts[0] + 1] or axes != [0] or squeeze is None or _ints(squeeze.inputs[1]) != [0]:
            return None
        found[starts[0]] = squeeze.outputs[0]
    whole = sorted(found) == [0, 1, 2] and len(stacked.uses()) == 3 and not any(v.is_graph_output() for v in found.values())
    return [found[i] for i in range(3)] if whole else None


def _transpose_key(graph: ir.Graph, swap: ir.Node) -> bool:
    """Rule 2: key [B, H, N, d] to [-1, N, d], swapped, to [B, H, d, N]."""
    before, after = _producer(swap.inputs[0], "Reshape"), _only_user(swap.outputs[0], "Reshape")
    key = before.inputs[0] if before is not None else None
    if before is None or after is None or key is None or key.shape is None or len(key.shape) != 4:
        return False
    if len(before.outputs[0].uses()) != 1 or before.outputs[0].is_graph_output() or after.outputs[0].is_graph_output():
        return False
    if _dims_of(before.inputs[1], key) != [None, 2, 3] or _dims_of(after.inputs[1], key) != [*LAST_TWO]:
        return False
    new = Tape(graph, swap, swap.name or "key").op("Transpose", [key], name="key", perm=list(LAST_TWO))[0]
    new.type, new.shape = key.type, ir.Shape([key.shape[i] for i in LAST_TWO])
    ir.convenience.replace_all_uses_with(after.outputs[0], new)
    return True


def _dims_of(wanted: ir.Value | None, key: ir.Value) -> list[int | None]:
    """A shape computed from that of `key` [., ., ., .] as dimensions of it, None for -1; empty if it is anything else."""
    concat = _producer(wanted, "Concat")
    dims: list[int | None] = []
    for value in concat.inputs if concat is not None else ():
        if _ints(value) == [-1]:
            dims.append(None)
            continue
        part = _producer(value, "Slice")
        source = _producer(part.inputs[0], "Shape") if part is not None else None
        if part is None or source is None or source.inputs[0] is not key:
            return []
        starts, ends = (_ints(v) for v in part.inputs[1:3])
        if len(starts) != 1 or len(ends) != 1:
            return []
        dims += range(4)[starts[0] : ends[0]]
    return dims


def _merge_transposes(node: ir.Node) -> None:
    """Rule 3: `node` reads another Transpose's result."""
    first = _producer(node.inputs[0], "Transpose")
    inner, outer = _perm(first) if first is not None else (), _perm(node)
    if first is None or not inner or len(inner) != len(outer):
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
