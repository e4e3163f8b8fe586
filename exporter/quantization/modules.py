"""Linear layers and convolutions with int8 weights and inputs, and the model that has them in the place of the float ones.

Weights: one scale an output channel, the channel's largest magnitude over 127. Inputs: one scale a tensor, from calibration.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from exporter.quantization.ops import HIGH, dequantize, quantize_dequantize
from moee.errors import UserError
from moee.layers.routed import RoutedLayer


class _Int8(nn.Module):
    """`q` int8, `scale` [channels], `input_scale` []; the scales are rounded to `dtype` before anything is divided by them.

    `closest_calls`: of each image, the input value nearest to the border between two steps takes the other one. Other
    arithmetic does no worse than that, so it shows what a rounding error in the last digit may grow to.
    """

    closest_calls = False
    q: Tensor
    scale: Tensor
    input_scale: Tensor

    def __init__(self, weight: Tensor, axis: int, bias: Tensor | None, input_scale: float, dtype: torch.dtype):
        super().__init__()
        self.axis = axis
        others = [d for d in range(weight.dim()) if d != axis]
        scale = (weight.abs().amax(others) / HIGH).clamp(min=torch.finfo(dtype).tiny).to(dtype)
        shape = [1] * weight.dim()
        shape[axis] = -1
        q = torch.clamp(torch.round(weight / scale.to(weight.dtype).reshape(shape)), -HIGH, HIGH).to(torch.int8)
        self.register_buffer("q", q.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("input_scale", torch.tensor(input_scale).clamp(min=torch.finfo(dtype).tiny).to(dtype))
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input as int8 steps hold it, and the weight, both in x's type."""
        weight = dequantize(self.q, self.scale, self.axis)
        if self.closest_calls:
            x = _other_side(x, self.input_scale.float())
        return quantize_dequantize(x, self.input_scale), weight


def _other_side(x: Tensor, scale: Tensor) -> Tensor:
    """x [B, ...] with one value in each x[b] moved across the border that it is nearest to."""
    steps = (x.float() / scale).flatten(1)
    nearest = torch.round(steps)
    distance = 0.5 - (steps - nearest).abs()
    distance[(nearest >= HIGH) | (nearest <= -HIGH)] = 1.0  # beyond the last border all are equal
    at = distance.argmin(1, keepdim=True)
    side = torch.where(steps.gather(1, at) >= nearest.gather(1, at), 1.0, -1.0)
    moved = (nearest.gather(1, at) + side) * scale
    return x.flatten(1).scatter(1, at, moved.to(x.dtype)).reshape(x.shape)


class QuantLinear(_Int8):
    """x [..., in] to [..., out]. `q` is [in, out]: stored as the product reads it, without a transposition in between."""

    def __init__(self, layer: nn.Linear, input_scale: float, dtype: torch.dtype):
        super().__init__(layer.weight.detach().T, 1, layer.bias, input_scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.operands(x)
        y = x @ weight
        return y if self.bias is None else y + self.bias


class QuantConv2d(_Int8):
    """x [B, C, H, W]; `q` is [out, C / groups, h, w]."""

    def __init__(self, layer: nn.Conv2d, input_scale: float, dtype: torch.dtype):
        super().__init__(layer.weight.detach(), 0, layer.bias, input_scale, dtype)
        self.options: dict[str, Any] = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "groups")}

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.operands(x)
        return nn.functional.conv2d(x, weight, self.bias, **self.options)


def quantizable(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Linear layers and zero-padded convolutions outside the routed layers, by name, in the order of the model."""
    routed = tuple(name + "." for name, module in model.named_modules() if isinstance(module, RoutedLayer))
    return {
        name: module
        for name, module in model.named_modules()
        if not name.startswith(routed)
        and (type(module) is nn.Linear or (isinstance(module, nn.Conv2d) and module.padding_mode == "zeros"))
    }


def quantized(
    model: nn.Module, input_scales: Mapping[str, float], dtype: torch.dtype, closest_calls: bool = False
) -> nn.Module:
    """A copy of float32 `model` with int8 layers at the names of `input_scales`; their scales are of type `dtype`.

    Raises `UserError` for a name that is no layer which can be quantised.
    """
    result = copy.deepcopy(model)
    layers = quantizable(result)
    for name, input_scale in input_scales.items():
        if name not in layers:
            raise UserError(f"the export quantises {name!r}, which is no dense layer of the model; export it again")
        layer, (parent, _, child) = layers[name], name.rpartition(".")
        made = QuantLinear(layer, input_scale, dtype) if isinstance(layer, nn.Linear) else QuantConv2d(layer, input_scale, dtype)
        made.closest_calls = closest_calls
        setattr(result.get_submodule(parent), child, made)
    return result.eval()
