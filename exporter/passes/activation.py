"""The activations of `moee.layers.activations` as standard ONNX operators, by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from exporter.passes.tape import Tape
from moee.layers.activations import QUICK


def _silu(tape: Tape, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    return tape.op("Mul", [x, tape.op("Sigmoid", [x])[0]])[0]


def _quick_gelu(tape: Tape, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """In float32 whatever the type: rounded to bfloat16 the slope would be 1.703."""
    typed = dtype != ir.DataType.FLOAT
    x = tape.op("Cast", [x], to=int(ir.DataType.FLOAT))[0] if typed else x
    slope = tape.constant(np.array(QUICK, np.float32), "quick")
    y = tape.op("Mul", [x, tape.op("Sigmoid", [tape.op("Mul", [x, slope])[0]])[0]])[0]
    return tape.op("Cast", [y], to=int(dtype))[0] if typed else y


FORMS: dict[str, Callable[[Tape, ir.Value, ir.DataType], ir.Value]] = {
    "gelu": lambda tape, x, dtype: tape.op("Gelu", [x], approximate="none")[0],
    "gelu_tanh": lambda tape, x, dtype: tape.op("Gelu", [x], approximate="tanh")[0],
    "relu": lambda tape, x, dtype: tape.op("Relu", [x])[0],
    "silu": _silu,
    "quick_gelu": _quick_gelu,
}


def activation(tape: Tape, x: ir.Value, name: str, dtype: ir.DataType) -> ir.Value:
    """Activation `name` of x, which is of type `dtype`; `ValueError` for an unknown name."""
    if name not in FORMS:
        raise ValueError(f"unknown activation {name!r}; expected one of {', '.join(FORMS)}")
    return FORMS[name](tape, x, dtype)
