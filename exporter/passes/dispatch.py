"""Tokens sorted once by expert, each expert's group computed alone, the results put back: with standard ONNX operators.

1. order = slots sorted by expert (TopK of the whole, stable); counts an expert by comparing routes with 0..K-1.
2. Few experts: Split the order and Gather each group's tokens, one copy. Many: Gather all, then Split, fewer nodes. Which is
   faster turns at about eight experts (ONNX Runtime on the CPU).
3. Concat and Gather by the inverse permutation, which a scatter of 0..T-1 to `order` makes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from exporter.passes.tape import Tape

FEW_EXPERTS = 8


def by_expert(
    tape: Tape, tokens: ir.Value, routes: ir.Value, experts: int, body: Callable[[int, ir.Value], ir.Value], *, top_k: int = 1,
    name: str = "",
) -> ir.Value:  # fmt: skip
    """Results [T * top_k, D'] in slot order of `body(expert, tokens [n, D])` on tokens [T, D] by routes [T * top_k]."""
    if experts == 1:
        return _named(tape, body(0, tokens), name)
    size = tape.op("Shape", [routes])[0]
    order = tape.op("TopK", [routes, size], outputs=2, axis=0, largest=0, sorted=1)[1]  # rule 1
    ids = tape.constant(np.arange(experts, dtype=np.int64)[:, None], "ids")
    hits = tape.op("Cast", [tape.op("Equal", [ids, routes])[0]], to=int(ir.DataType.INT32))[0]
    counts = tape.op("ReduceSum", [hits, tape.constant(np.array([1], np.int64), "axis")], keepdims=0)[0]
    counts = tape.op("Cast", [counts], to=int(ir.DataType.INT64))[0]
    source = order
    if top_k > 1:
        source = tape.op("Div", [order, tape.constant(np.array(top_k, np.int64), "top_k")])[0]
    if experts <= FEW_EXPERTS:  # rule 2
        groups = [tape.op("Gather", [tokens, g], axis=0)[0] for g in tape.op("Split", [source, counts], outputs=experts, axis=0)]
    else:
        gathered = tape.op("Gather", [tokens, source], axis=0)[0]
        groups = tape.op("Split", [gathered, counts], outputs=experts, axis=0)
    joined = tape.op("Concat", [body(e, group) for e, group in enumerate(groups)], axis=0)[0]  # rule 3
    zero, one = (tape.constant(np.array(v, np.int64), f"int_{v}") for v in (0, 1))
    positions = tape.op("Range", [zero, tape.op("Size", [routes])[0], one])[0]
    inverse = tape.op("ScatterElements", [order, order, positions], axis=0)[0]
    return tape.op("Gather", [joined, inverse], axis=0, name=name)[0]


def _named(tape: Tape, value: ir.Value, name: str) -> ir.Value:
    return tape.op("Identity", [value], name=name)[0] if name else value
