"""Two torch operators that are traced to ONNX's QuantizeLinear and DequantizeLinear: symmetric, int8, zero point 0.

Tensors below float32 are scaled in float32 and rounded once, as ONNX Runtime does it; float64 stays float64, for the yardstick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnxscript
import torch
from torch import Tensor

LOW, HIGH = -128, 127
OPSET = 20  # of every int8 graph; 19 is the first with a scale in float16


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@torch.library.custom_op("moee::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor) -> Tensor:
    """x of any shape, rounded to multiples -128..127 of `scale` [] (half to even), in x's type."""
    steps = torch.clamp(torch.round(_wide(x) / _wide(scale)), LOW, HIGH)
    return (steps * _wide(scale)).to(x.dtype)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("moee::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    """int8 `q` times `scale` [q.shape[axis]] along `axis`, in the scale's type."""
    shape = [1] * q.dim()
    shape[axis] = -1
    return (q.to(_wide(scale).dtype) * _wide(scale).reshape(shape)).to(scale.dtype)


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


_onnx = onnxscript.values.Opset("", OPSET)


def _quantize_dequantize(x, scale):
    zero = _onnx.Constant(value=onnx.helper.make_tensor("zero", onnx.TensorProto.INT8, [], [0]))
    return _onnx.DequantizeLinear(_onnx.QuantizeLinear(x, scale, zero), scale, zero)


def _dequantize(q, scale, axis: int):
    return _onnx.DequantizeLinear(q, scale, axis=axis)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.moee.quantize_dequantize.default: _quantize_dequantize,
    torch.ops.moee.dequantize.default: _dequantize,
}
