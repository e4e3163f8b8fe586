"""Lower `moee::MoeeFfn` to standard ONNX operators: sort the tokens once by expert, then one pair of Gemm an expert.

Rules, in the order of the emitted nodes:
1. Flatten x to tokens [T, D]; scores = tokens @ router.T + router_bias.
   Scores are float32 whatever x's type; a token with a score that is not finite gets all its scores replaced by zero.
2. top_k = 1: route = ArgMax (lowest id on ties). top_k > 1: route = the k best, slots [T * k].
3. order = slots sorted by expert; counts an expert by comparing routes with 0..K-1.
4. Gather the sorted tokens, Split them by counts.
5. Per expert: Gemm(up) -> activation -> Gemm(down) on constant slices of the shared stores. The slices are Gathers of
   initialisers, which ONNX Runtime folds when it loads the graph: the file keeps one copy of each neuron.
6. Concat, put back in slot order by the inverse permutation; top_k > 1: sum a token's slots.
7. Restore x's shape.
8. Three values have fixed names, so that verification can read and replace them: `<layer>/tokens` [T, D], `<layer>/route`
   [T * k], which alone decides where tokens go, and `<layer>/result` [T, D].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from plugins.contract import DOMAIN, INPUT_NAMES, OP_TYPE


class _Tape:
    """Appends nodes and constants of one layer; values are prefixed with the layer's name."""

    def __init__(self, graph: ir.Graph, before: ir.Node, prefix: str):
        self.graph, self.before, self.prefix, self.count = graph, before, prefix, 0

    def op(self, kind: str, inputs: Sequence[ir.Value | None], outputs: int = 1, name: str = "", **attributes) -> list[ir.Value]:
        self.count += 1
        label = f"{self.prefix}/{name or f'{kind}_{self.count}'}"
        converted = ir.convenience.convert_attributes(attributes)
        node = ir.Node("", kind, inputs, converted, num_outputs=outputs, name=label)
        for position, value in enumerate(node.outputs):
            value.name = label if outputs == 1 else f"{label}:{position}"
        self.graph.insert_before(self.before, node)
        return list(node.outputs)

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        label = f"{self.prefix}/{name}"
        value = ir.Value(name=label, type=ir.TensorType(ir.tensor(array).dtype), shape=ir.Shape(array.shape))
        value.const_value = ir.tensor(array, name=label)
        self.graph.register_initializer(value)
        return value


def _activation(tape: _Tape, x: ir.Value, kind: str) -> ir.Value:
    if kind == "gelu":
        return tape.op("Gelu", [x], approximate="none")[0]
    if kind == "gelu_tanh":
        return tape.op("Gelu", [x], approximate="tanh")[0]
    if kind == "relu":
        return tape.op("Relu", [x])[0]
    if kind == "silu":
        return tape.op("Mul", [x, tape.op("Sigmoid", [x])[0]])[0]
    raise ValueError(f"unknown activation {kind!r}; expected gelu, gelu_tanh, relu or silu")


def lower_routed_ffn(model: ir.Model) -> int:
    """Replace every `MoeeFfn` node in place; returns how many there were.

    Raises `ValueError` for a node whose routing tables are not initialisers.
    """
    nodes = [n for n in model.graph if n.domain == DOMAIN and n.op_type == OP_TYPE]
    for node in nodes:
        _lower(model.graph, node)
    if nodes:
        model.opset_imports.pop(DOMAIN, None)
        for name in [n for n, value in model.graph.initializers.items() if not value.uses()]:
            del model.graph.initializers[name]
    return len(nodes)


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    inputs = dict(zip(INPUT_NAMES, node.inputs, strict=True))
    tables: dict[str, np.ndarray] = {}
    for name in ("neurons", "offsets"):
        value = inputs[name]
        if value is None or value.const_value is None:
            raise ValueError(f"`{node.name}`: {name} must be an initialiser to be lowered to standard operators")
        tables[name] = value.const_value.numpy()
    top_k, activation = node.attributes["top_k"].as_int(), node.attributes["activation"].as_string()
    offsets, experts = tables["offsets"], len(tables["offsets"]) - 1
    x, router = inputs["x"], inputs["router"]
    assert x is not None and router is not None and router.shape is not None, "checked by the operator's contract"
    dim = router.shape[1]
    assert isinstance(dim, int), "the router is an initialiser, its shape is static"
    tape = _Tape(graph, node, node.name or "moee")

    minus_one = tape.constant(np.array([-1], np.int64), "minus_one")
    tokens = tape.op("Reshape", [x, tape.constant(np.array([-1, dim], np.int64), "token_shape")], name="tokens")[0]  # rule 1
    routes = _routes(tape, tokens, router, inputs["router_bias"], top_k, minus_one)  # rule 2
    ones = tape.op("Shape", [routes])[0]
    order = tape.op("TopK", [routes, ones], outputs=2, axis=0, largest=0, sorted=1)[1]  # rule 3
    ids = tape.constant(np.arange(experts, dtype=np.int64)[:, None], "ids")
    hits = tape.op("Cast", [tape.op("Equal", [ids, routes])[0]], to=int(ir.DataType.INT32))[0]
    counts = tape.op("ReduceSum", [hits, tape.constant(np.array([1], np.int64), "axis")], keepdims=0)[0]
    counts = tape.op("Cast", [counts], to=int(ir.DataType.INT64))[0]
    source = order
    if top_k > 1:
        source = tape.op("Div", [order, tape.constant(np.array(top_k, np.int64), "top_k")])[0]
    gathered = tape.op("Gather", [tokens, source], axis=0)[0]  # rule 4
    groups = tape.op("Split", [gathered, counts], outputs=experts, axis=0) if experts > 1 else [gathered]

    parts = []
    for e, group in enumerate(groups):  # rule 5
        kept = tape.constant(tables["neurons"][offsets[e] : offsets[e + 1]].astype(np.int64), f"neurons_{e}")
        row = tape.constant(np.array(e, np.int64), f"id_{e}")
        up, b_up, down = (tape.op("Gather", [inputs[n], kept], axis=0)[0] for n in ("w_up", "b_up", "w_down"))
        b_out = tape.op("Gather", [inputs["b_out"], row], axis=0)[0]
        hidden = _activation(tape, tape.op("Gemm", [group, up, b_up], transB=1)[0], activation)
        parts.append(tape.op("Gemm", [hidden, down, b_out])[0])

    joined = tape.op("Concat", parts, axis=0)[0] if experts > 1 else parts[0]  # rule 6
    inverse = tape.op("TopK", [order, ones], outputs=2, axis=0, largest=0, sorted=1)[1]
    y = tape.op("Gather", [joined, inverse], axis=0, name="slots" if top_k > 1 else "result")[0]  # rule 8
    if top_k > 1:
        slots = tape.op("Reshape", [y, tape.constant(np.array([-1, top_k, dim], np.int64), "slot_shape")])[0]
        axis = tape.constant(np.array([1], np.int64), "slot_axis")
        y = tape.op("ReduceSum", [slots, axis], keepdims=0, name="result")[0]
    result = tape.op("Reshape", [y, tape.op("Shape", [x])[0]])[0]  # rule 7
    old = node.outputs[0]
    result.type, result.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _routes(tape: _Tape, tokens: ir.Value, router: ir.Value, bias: ir.Value | None, top_k: int, minus_one: ir.Value) -> ir.Value:
    """Expert of each slot, [T * top_k] int64."""
    if router.dtype != ir.DataType.FLOAT:
        tokens, router = (tape.op("Cast", [v], to=int(ir.DataType.FLOAT))[0] for v in (tokens, router))
    raw = tape.op("Gemm", [tokens, router, bias], transB=1)[0]
    # a - a is 0 for a finite a, else NaN, and so is the sum over the experts
    excess = tape.op("ReduceSum", [tape.op("Sub", [raw, raw])[0], minus_one], keepdims=1)[0]
    zero = tape.constant(np.array(0, np.float32), "zero")
    scores = tape.op("Where", [tape.op("IsNaN", [excess])[0], zero, raw], name="scores")[0]
    if top_k == 1:
        return tape.op("ArgMax", [scores], axis=1, keepdims=0, name="route")[0]
    k = tape.constant(np.array([top_k], np.int64), "k")
    best = tape.op("TopK", [scores, k], outputs=2, axis=1, largest=1, sorted=1)[1]
    return tape.op("Reshape", [best, minus_one], name="route")[0]
