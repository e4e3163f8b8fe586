"""Lower `moee::ClearFfn` to standard ONNX operators, in one of two forms.

Rules, in the order of the emitted nodes:
1. Flatten x to tokens [T, D]; route = ArgMax of the router's scores (two Gemm and a Relu if the router has two layers).
   Scores are float32 whatever x's type.
2. `masked`, no dispatch: per map Gemm(tokens, inward) gives the shared and all experts' coefficients [T, r + K q + K]; Where
   with the mask row of the token's expert sets the other experts' to zero (a product would make NaN of an overflow);
   MatMul(outward) adds everything up. The last K columns are ones before the mask and stand for the experts' biases, so no
   [T, H] tensor is gathered or added.
3. `sorted`: tokens grouped by expert (see `dispatch`), per expert the same two products on constant slices (shared rows and its
   own). Only the token's own expert is computed.
4. Slices, zeros and masks are constants or constant expressions of initialisers, which runtimes fold at load: the file keeps
   every weight once, and both forms share one data file.
5. Three values have fixed names, as in the portable form of `MoeeFfn`: `<layer>/tokens` [T, D], `<layer>/route` [T], which alone
   decides where tokens go, and `<layer>/result` [T, D]. In the masked form the nodes that read the weights have names too
   (`STORED_AT`), so that verification finds the weights by where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from exporter.passes.activation import activation as activate
from exporter.passes.dispatch import by_expert
from exporter.passes.stored import drop_unused, nodes_of
from exporter.passes.tape import Tape

OP_TYPE = "ClearFfn"
INPUT_NAMES = (
    "x", "router", "router_bias", "router_hidden", "router_hidden_bias", "up_in", "up_out", "up_bias", "down_in", "down_out",
    "down_bias",
)  # fmt: skip
Form = Literal["masked", "sorted"]
# Each input of the operator: which node `<layer>/...` of the masked form reads it, and as which of its inputs (in typed graphs
# behind a Cast).
STORED_AT = {
    "router": ("scores", 1), "router_bias": ("scores", 2),
    "router_hidden": ("features", 1), "router_hidden_bias": ("features", 2),
    "up_in": ("up_inward", 0), "up_out": ("up_outward", 0), "up_bias": ("up_outward", 1),
    "down_in": ("down_inward", 0), "down_out": ("down_outward", 0), "down_bias": ("down_outward", 1),
}  # fmt: skip


def lower_clear_ffn(model: ir.Model, form: Form | Mapping[str, Form]) -> int:
    """Replace every `ClearFfn` node in place; returns how many there were. `form` is one for all, or one a layer by name. Raises
    `ValueError` for an unknown form."""
    nodes = nodes_of(model, OP_TYPE)
    for node in nodes:
        chosen = form if isinstance(form, str) else form[node.name or ""]
        if chosen not in ("masked", "sorted"):
            raise ValueError(f"unknown form {chosen!r}; expected masked or sorted")
        _lower(model.graph, node, chosen)
    if nodes:
        drop_unused(model)
    return len(nodes)


def _shape(value: ir.Value | None) -> list[int]:
    assert value is not None and value.shape is not None, "weights are initialisers, their shapes are static"
    return [int(d) for d in value.shape]  # type: ignore[arg-type]


def _lower(graph: ir.Graph, node: ir.Node, form: Form) -> None:
    inputs = dict(zip(INPUT_NAMES, node.inputs, strict=True))
    ranks = [int(v) for v in node.attributes["ranks"].as_ints()]
    activation = node.attributes["activation"].as_string()
    dim = _shape(inputs["up_in"])[1]
    tape = Tape(graph, node, node.name or "clear")
    x = inputs["x"]
    tokens = tape.op("Reshape", [x, tape.constant(np.array([-1, dim], np.int64), "token_shape")], name="tokens")[0]  # rule 1
    route = _route(tape, tokens, inputs)
    lower = _masked if form == "masked" else _sorted
    y = lower(tape, tokens, route, inputs, ranks, activation)
    result = tape.op("Reshape", [y, tape.op("Shape", [x])[0]])[0]
    tape.finish(result)


def _route(tape: Tape, tokens: ir.Value, inputs: dict[str, ir.Value | None]) -> ir.Value:
    """Expert of each token, [T] int64."""
    stored = inputs["router"]
    assert stored is not None, "the operator has a router"
    typed = stored.dtype != ir.DataType.FLOAT

    def float32(value: ir.Value | None) -> ir.Value | None:
        return tape.op("Cast", [value], to=int(ir.DataType.FLOAT))[0] if typed else value

    features = float32(tokens)
    if _shape(inputs["router_hidden"])[0]:
        rows = float32(inputs["router_hidden"])
        hidden = tape.op("Gemm", [features, rows, inputs["router_hidden_bias"]], transB=1, name="features")[0]
        features = tape.op("Relu", [hidden])[0]
    rows = float32(stored)
    scores = tape.op("Gemm", [features, rows, inputs["router_bias"]], transB=1, name="scores")[0]
    return tape.op("ArgMax", [scores], axis=1, keepdims=0, name="route")[0]


def _mask(rank: int, residual: int, experts: int) -> np.ndarray:
    """Rows [K, r + K q + K]: true for the shared part, for the expert's own coefficients and for its bias."""
    own = np.eye(experts, dtype=np.bool_)
    return np.concatenate([np.ones((experts, rank), np.bool_), own.repeat(residual, axis=1), own], axis=1)


def _masked(
    tape: Tape, tokens: ir.Value, route: ir.Value, inputs: dict[str, ir.Value | None], ranks: list[int], activation: str
) -> ir.Value:
    """Rule 2."""
    rows, experts = tokens, _shape(inputs["up_bias"])[0]
    for position, name in enumerate(("up", "down")):
        rank, residual = ranks[2 * position : 2 * position + 2]
        stored = inputs[f"{name}_in"]
        assert stored is not None and stored.dtype is not None, "weights are initialisers, their types are known"
        width, dtype = _shape(stored)[1], stored.dtype.numpy()
        ones = np.concatenate([np.zeros(rank + experts * residual, dtype), np.ones(experts, dtype)])
        empty = tape.constant(np.zeros((experts, width), dtype), f"{name}_no_input")
        inward = tape.op("Concat", [stored, empty], axis=0, name=f"{name}_inward")[0]
        outward = tape.op("Concat", [inputs[f"{name}_out"], inputs[f"{name}_bias"]], axis=0, name=f"{name}_outward")[0]
        table = tape.constant(_mask(rank, residual, experts), f"{name}_mask")
        coefficients = tape.op("Gemm", [rows, inward, tape.constant(ones, f"{name}_ones")], transB=1)[0]
        none = tape.constant(np.array(0, dtype), "nothing")
        kept = tape.op("Where", [tape.op("Gather", [table, route], axis=0)[0], coefficients, none])[0]
        rows = tape.op("MatMul", [kept, outward], name="result" if name == "down" else "")[0]  # rule 5
        if name == "up":
            rows = activate(tape, rows, activation, stored.dtype)
    return rows


def _sorted(
    tape: Tape, tokens: ir.Value, route: ir.Value, inputs: dict[str, ir.Value | None], ranks: list[int], activation: str
) -> ir.Value:
    """Rule 3."""

    stored = inputs["up_in"]
    assert stored is not None and stored.dtype is not None, "weights are initialisers, their types are known"
    dtype = stored.dtype

    def body(expert: int, rows: ir.Value) -> ir.Value:
        for position, name in enumerate(("up", "down")):
            rank, residual = ranks[2 * position : 2 * position + 2]
            own = np.concatenate([np.arange(rank), rank + expert * residual + np.arange(residual)]).astype(np.int64)
            index = tape.constant(own, f"{name}_rows_{expert}")
            inward, outward = (tape.op("Gather", [inputs[f"{name}_{side}"], index], axis=0)[0] for side in ("in", "out"))
            number = tape.constant(np.array(expert, np.int64), f"int_{expert}")
            bias = tape.op("Gather", [inputs[f"{name}_bias"], number], axis=0)[0]
            rows = tape.op("Gemm", [rows, inward], transB=1)[0]
            rows = tape.op("Gemm", [rows, outward, bias])[0]
            if name == "up":
                rows = activate(tape, rows, activation, dtype)
        return rows

    return by_expert(tape, tokens, route, _shape(inputs["up_bias"])[0], body, name="result")  # rule 5
