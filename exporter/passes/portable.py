"""Lower `moee::MoeeFfn` to standard ONNX operators: sort the tokens once by expert, then one pair of Gemm an expert.

Rules, in the order of the emitted nodes:
1. Flatten x to tokens [T, D]; scores = tokens @ router.T + router_bias.
   Scores are float32 whatever x's type; a token with a score that is not finite goes to expert 0 (top_k > 1: scores zero).
2. top_k = 1: route = ArgMax (lowest id on ties). top_k > 1: route = the k best, slots [T * k].
3. `grouped`: per expert Gemm(up) -> activation -> Gemm(down) on its own tokens (see `dispatch`), on constant slices of the
   shared stores. The slices are Gathers of initialisers, which ONNX Runtime folds when it loads the graph: the file keeps one
   copy of each neuron. top_k > 1: sum a token's slots. With top_k = 1, neurons that every expert keeps, if there are `CORE` or
   more of them, are no expert's: one pair of Gemm computes them for all tokens, which is faster than for few at a time.
4. `masked`: one pair of Gemm over the union of the neurons; those that the token's expert lacks are set to zero before the
   activation, which leaves zero as it is: a product with 0 would turn one that overflowed into NaN. Costs the union, but reads
   each weight once.
5. With top_k = 1 and so many experts that one image leaves fewer than `MIN_ROWS` tokens an expert, an `If` on the number of
   tokens takes the masked form below `MIN_ROWS` an expert, the grouped form above. Otherwise the grouped form stands alone.
6. Restore x's shape.
7. Three values have fixed names, so that verification can read and replace them: `<layer>/tokens` [T, D], `<layer>/route`
   [T * k], which alone decides where tokens go, and `<layer>/result` [T, D].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter.passes.activation import activation
from exporter.passes.dispatch import by_expert
from exporter.passes.stored import drop_unused, nodes_of
from exporter.passes.tape import Tape
from plugins.contract import DOMAIN, INPUT_NAMES, OP_TYPE

CORE = 256  # neurons that every expert keeps, from which products of their own are faster (docs/results/cpu.md)
MIN_ROWS = 12  # tokens an expert from which the grouped form is faster (docs/results/cpu.md)


@dataclass(frozen=True)
class _Layer:
    """One node: its inputs by name, its routing tables and attributes."""

    inputs: dict[str, ir.Value | None]
    neurons: np.ndarray
    offsets: np.ndarray
    top_k: int
    activation: str

    @property
    def experts(self) -> int:
        return len(self.offsets) - 1

    @property
    def dtype(self) -> ir.DataType:
        up = self.inputs["w_up"]
        assert up is not None and up.dtype is not None, "the weights are initialisers"
        return up.dtype

    @property
    def core(self) -> np.ndarray:
        """Neurons that every expert keeps, ascending, where they are worth products of their own; else none."""
        if self.top_k > 1 or self.experts == 1:
            return np.zeros(0, np.int64)
        ids, keepers = np.unique(self.neurons, return_counts=True)
        core = ids[keepers == self.experts].astype(np.int64)
        return core if len(core) >= CORE else core[:0]

    def kept(self, expert: int) -> np.ndarray:
        return self.neurons[self.offsets[expert] : self.offsets[expert + 1]].astype(np.int64)


def lower_routed_ffn(model: ir.Model) -> int:
    """Replace every `MoeeFfn` node in place; returns how many there were.

    Raises `ValueError` for a node whose routing tables are not initialisers.
    """
    nodes = nodes_of(model, OP_TYPE)
    for node in nodes:
        _lower(model.graph, node)
    if nodes:
        model.opset_imports.pop(DOMAIN, None)
        drop_unused(model)
    return len(nodes)


def _read(node: ir.Node) -> _Layer:
    inputs = dict(zip(INPUT_NAMES, node.inputs, strict=True))
    tables: dict[str, np.ndarray] = {}
    for name in ("neurons", "offsets"):
        value = inputs[name]
        if value is None or value.const_value is None:
            raise ValueError(f"`{node.name}`: {name} must be an initialiser to be lowered to standard operators")
        tables[name] = value.const_value.numpy()
    top_k, kind = node.attributes["top_k"].as_int(), node.attributes["activation"].as_string()
    return _Layer(inputs, tables["neurons"], tables["offsets"], top_k, kind)


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    layer = _read(node)
    x, router = layer.inputs["x"], layer.inputs["router"]
    assert x is not None and router is not None and router.shape is not None, "checked by the operator's contract"
    dim = router.shape[1]
    assert isinstance(dim, int), "the router is an initialiser, its shape is static"
    tape = Tape(graph, node, node.name or "moee")
    tokens = tape.op("Reshape", [x, tape.constant(np.array([-1, dim], np.int64), "token_shape")], name="tokens")[0]  # rule 1
    routes = _routes(tape, tokens, router, layer.inputs["router_bias"], layer.top_k)  # rule 2
    if layer.top_k == 1 and _tokens_an_image(x) < MIN_ROWS * layer.experts:  # rule 5
        y = _either(tape, layer, tokens, routes, dim)
    else:
        y = _grouped(tape, layer, tokens, routes, dim, "result")
    result = tape.op("Reshape", [y, tape.op("Shape", [x])[0]])[0]  # rule 6
    tape.finish(result)


def _tokens_an_image(x: ir.Value) -> int:
    """Tokens behind the batch dimension of x [batch, ..., D]; 0 if they are not fixed."""
    inner = list(x.shape)[1:-1] if x.shape is not None else []
    fixed = [d for d in inner if isinstance(d, int)]
    return math.prod(fixed) if inner and len(fixed) == len(inner) else 0


def _routes(tape: Tape, tokens: ir.Value, router: ir.Value, bias: ir.Value | None, top_k: int) -> ir.Value:
    """Expert of each slot, [T * top_k] int64."""
    if router.dtype != ir.DataType.FLOAT:
        tokens, router = (tape.op("Cast", [v], to=int(ir.DataType.FLOAT))[0] for v in (tokens, router))
    raw = tape.op("Gemm", [tokens, router, bias], transB=1)[0]
    last = tape.constant(np.array([-1], np.int64), "minus_one")
    # a - a is 0 for a finite a, else NaN, and so is the sum over the experts
    difference = tape.op("Sub", [raw, raw])[0]
    if top_k == 1:
        lost = tape.op("IsNaN", [tape.op("ReduceSum", [difference, last], keepdims=0)[0]])[0]
        best = tape.op("ArgMax", [raw], axis=1, keepdims=0)[0]
        return tape.op("Where", [lost, tape.constant(np.array(0, np.int64), "int_0"), best], name="route")[0]
    lost = tape.op("IsNaN", [tape.op("ReduceSum", [difference, last], keepdims=1)[0]])[0]
    scores = tape.op("Where", [lost, tape.constant(np.array(0, np.float32), "zero"), raw])[0]
    k = tape.constant(np.array([top_k], np.int64), "k")
    chosen = tape.op("TopK", [scores, k], outputs=2, axis=1, largest=1, sorted=1)[1]
    return tape.op("Reshape", [chosen, last], name="route")[0]


def _grouped(tape: Tape, layer: _Layer, tokens: ir.Value, routes: ir.Value, dim: int, name: str) -> ir.Value:
    """Rule 3."""
    inputs, core = layer.inputs, layer.core

    def products(group: ir.Value, neurons: np.ndarray, title: str, b_out: ir.Value | None) -> ir.Value:
        kept = tape.constant(neurons, f"neurons_{title}")
        up, b_up, down = (tape.op("Gather", [inputs[n], kept], axis=0)[0] for n in ("w_up", "b_up", "w_down"))
        hidden = activation(tape, tape.op("Gemm", [group, up, b_up], transB=1)[0], layer.activation, layer.dtype)
        return tape.op("Gemm", [hidden, down, b_out])[0]

    def body(expert: int, group: ir.Value) -> ir.Value:
        row = tape.constant(np.array(expert, np.int64), f"int_{expert}")
        b_out = tape.op("Gather", [inputs["b_out"], row], axis=0)[0]
        rest = np.setdiff1d(layer.kept(expert), core)
        if not len(rest):
            return tape.op("Expand", [b_out, tape.op("Shape", [group])[0]])[0]
        return products(group, rest, str(expert), b_out)

    title = "slots" if layer.top_k > 1 else "" if len(core) else name
    slots = by_expert(tape, tokens, routes, layer.experts, body, top_k=layer.top_k, name=title)
    if len(core):
        slots = tape.op("Add", [slots, products(tokens, core, "core", None)], name=name)[0]
    if layer.top_k == 1:
        return slots
    shaped = tape.op("Reshape", [slots, tape.constant(np.array([-1, layer.top_k, dim], np.int64), "slot_shape")])[0]
    return tape.op("ReduceSum", [shaped, tape.constant(np.array([1], np.int64), "axis")], keepdims=0, name=name)[0]


def _masked(tape: Tape, layer: _Layer, tokens: ir.Value, routes: ir.Value) -> ir.Value:
    """Rule 4, top_k = 1."""
    inputs = layer.inputs
    up = inputs["w_up"]
    assert up is not None and up.shape is not None, "the weights are initialisers"
    table = np.zeros((layer.experts, int(up.shape[0])), np.bool_)  # type: ignore[arg-type]
    for expert in range(layer.experts):
        table[expert, layer.kept(expert)] = True
    kept = tape.op("Gather", [tape.constant(table, "mask"), routes], axis=0)[0]
    none = tape.constant(np.array(0, layer.dtype.numpy()), "nothing")
    before = tape.op("Where", [kept, tape.op("Gemm", [tokens, up, inputs["b_up"]], transB=1)[0], none])[0]
    product = tape.op("MatMul", [activation(tape, before, layer.activation, layer.dtype), inputs["w_down"]])[0]
    return tape.op("Add", [product, tape.op("Gather", [inputs["b_out"], routes], axis=0)[0]])[0]


def _either(tape: Tape, layer: _Layer, tokens: ir.Value, routes: ir.Value, dim: int) -> ir.Value:
    """Rule 5."""
    limit = tape.constant(np.array(MIN_ROWS * layer.experts, np.int64), "many_tokens")
    few = tape.op("Less", [tape.op("Size", [routes])[0], limit])[0]
    with tape.branch() as nodes:
        masked = _branch(tape, layer, _masked(tape, layer, tokens, routes), nodes, dim, "masked")
    with tape.branch() as nodes:
        grouped = _branch(tape, layer, _grouped(tape, layer, tokens, routes, dim, ""), nodes, dim, "grouped")
    return tape.choose(few, masked, grouped, "result")


def _branch(tape: Tape, layer: _Layer, y: ir.Value, nodes: list[ir.Node], dim: int, name: str) -> ir.Graph:
    y.type, y.shape = ir.TensorType(layer.dtype), ir.Shape([None, dim])
    return ir.Graph([], [y], nodes=nodes, name=f"{tape.prefix}/{name}")
