"""Typed models: float16 or bfloat16 where it is safe, float32 where sums and exponentials need it.

The types are set in PyTorch, so that the traced graph, the torch model that it is compared with and a strongly typed TensorRT
network all hold the same casts. Kept in float32: normalisation layers, softmax, unit lengths, routing scores, quick_gelu,
arithmetic with numbers that the type cannot hold, and the graph's input and output.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from timm.layers import RmsNorm, SimpleNorm
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moee.errors import UserError
from moee.layers.activations import activation_name
from moee.layers.routed import RoutedLayer

log = logging.getLogger("moee")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# 8-bit dense parts (exporter.quantization), and the type of everything else
INT8 = {"int8": torch.float16, "int8-fp32": torch.float32}
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm, RmsNorm, SimpleNorm)
ROUTER_BIASES = ("router_bias", "router_hidden_bias")  # of routed layers: they belong to scores, which are float32
SOFTMAX = (torch.softmax, Tensor.softmax, nn.functional.softmax)
# Divides tokens of zeros, which pad the windows of torchvision's Swin v2, by 1e-12: in float16 that is 0, and 0 / 0 is NaN.
UNIT_LENGTH = (nn.functional.normalize,)
HALVES = (torch.float16, torch.bfloat16)
# Elementwise arithmetic of a tensor and a Python number
ARITHMETIC = {
    f"{prefix}{name}{suffix}"
    for name in ("add", "sub", "mul", "div", "truediv", "true_divide", "multiply", "divide", "subtract", "pow")
    for prefix, suffix in (("", ""), ("__", "__"), ("__r", "__"))
} | {"rsub"}  # fmt: skip


class Quantization(BaseModel):
    """What calibration decided for one model. `input_scales`: step of the input of each quantised layer, by name.
    `kept`: layers that stay in floating point, and why. `method`: how the steps were set. `sqnr_db`: power of the model's output
    over that of the quantisation noise, in decibels, on calibration images (`images` of `data`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    input_scales: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    kept: dict[str, str]
    method: str
    sqnr_db: float
    images: int
    data: str


def dtype_of(precision: str) -> torch.dtype:
    """Type of a graph's tokens: of an int8 graph, that of what is not quantised. Raises `UserError` for an unknown name."""
    known = {**PRECISIONS, **INT8}
    if precision not in known:
        raise UserError(f"unknown precision {precision!r}; expected one of {', '.join(known)}")
    return known[precision]


def refuse_calibration(precision: str, given: bool) -> None:
    """Raise `UserError` if calibration images, or a number of them, are `given` for a precision that is not calibrated."""
    if given and precision not in INT8:
        raise UserError(f"--calibration-images and --data are for int8; --precision {precision} is not calibrated")


def _lowered_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that take the token type, by name: all floats but norms' and the routers' biases."""
    for prefix, module in model.named_modules():
        if isinstance(module, NORMS):
            continue
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_floating_point() and not (isinstance(module, RoutedLayer) and name in ROUTER_BIASES):
                yield f"{prefix}.{name}" if prefix else name, tensor


def refuse_overflow(model: nn.Module, dtype: torch.dtype, precision: str, what: str) -> None:
    """Raise `UserError` for a weight of `model` that `dtype` has no number for: the graph would hold an infinite one. `what` is
    the model's name in the sentence. Weights that all become zero are said."""
    for name, tensor in _lowered_tensors(model):
        lowered = tensor.to(dtype)
        if not lowered.isfinite().all():
            holding = [key for key, kind in PRECISIONS.items() if kind != dtype and tensor.to(kind).isfinite().all()]
            most, cure = float(tensor.detach().abs().max()), " or ".join(reversed(holding))
            raise UserError(
                f"--precision {precision}: `{name}` of {what} holds {most:.3g}, and {str(dtype).removeprefix('torch.')} ends at "
                f"{torch.finfo(dtype).max:g}; " + (f"use --precision {cure}" if cure else "check the weights")
            )
        if tensor.any() and not lowered.any():
            log.info("--precision %s: all of `%s` of %s is too small for it and becomes zero", precision, name, what)


def _rounds_a_number(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this is arithmetic of half-precision tensors with a Python number that their type cannot hold."""
    if getattr(func, "__name__", "") not in ARITHMETIC or "out" in kwargs:
        return False
    values = [*args, *kwargs.values()]
    dtypes = {v.dtype for v in values if isinstance(v, Tensor)}
    if len(dtypes) != 1 or not dtypes <= set(HALVES):
        return False
    return any(isinstance(v, (int, float)) and float(torch.tensor(float(v), dtype=next(iter(dtypes)))) != v for v in values)


class _Float32Parts(TorchFunctionMode):
    """What half-precision tensors are given to in float32: softmax, attention spelt out so that it has such a softmax; unit
    lengths; arithmetic with a number that their type cannot hold.

    For the number a traced graph has a constant of the tensors' type, while torch multiplies in float32 and rounds the product:
    attention's scale of 32 ** -0.5, rounded to bfloat16, is off by 1e-4, and with it every score. Powers of two, such as the
    scale of heads 64 wide, are exact, and no cast is added for them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (*SOFTMAX, *UNIT_LENGTH):
            given, named = (args[0], kwargs) if args else (kwargs["input"], {n: v for n, v in kwargs.items() if n != "input"})
            if given.dtype in HALVES:
                return func(given.float(), *args[1:], **named).to(given.dtype)
        if func is nn.functional.scaled_dot_product_attention and args[0].dtype in HALVES:
            with self:  # its arithmetic too
                return self._attention(*args, **kwargs)
        if _rounds_a_number(func, args, kwargs):
            dtype = next(v.dtype for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            exact = [v.float() if isinstance(v, Tensor) else v for v in args]
            named = {k: v.float() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            return func(*exact, **named).to(dtype)
        return func(*args, **kwargs)

    @staticmethod
    def _attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, **other: Any,
    ) -> Tensor:  # fmt: skip
        if is_causal or dropout_p or other:
            raise UserError("only plain attention can be exported in fp16 or bf16; use --precision fp32")
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
        exact = scores.float()
        if attn_mask is not None:
            exact = exact.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else exact + attn_mask.float()
        return exact.softmax(-1).to(v.dtype) @ v


class TypedModel(nn.Module):
    """A copy of `model` that computes in `dtype`; images [B, 3, H, W] float32 in, outputs float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.model = copy.deepcopy(model)
        for _, tensor in _lowered_tensors(self.model):
            tensor.data = tensor.data.to(dtype)
        for module in list(self.model.modules()):
            if isinstance(module, NORMS) or _has_a_slope(module):
                module.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
                module.register_forward_hook(lambda _, args, y: y.to(self.dtype))

    def forward(self, images: Tensor) -> Tensor:
        with _Float32Parts():
            return self.model(images.to(self.dtype)).float()


def _has_a_slope(module: nn.Module) -> bool:
    """Whether this is quick_gelu, whose slope of 1.702 would be rounded to the type: 1.703 in bfloat16."""
    return next(module.children(), None) is None and activation_name(module) == "quick_gelu"


def typed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model` in eval mode, computing in `dtype`: itself for float32, else a `TypedModel`."""
    return model.eval() if dtype == torch.float32 else TypedModel(model, dtype).eval()


class RoundedModel(nn.Module):
    """A copy of `model` whose weights are rounded to `dtype` and which computes in `compute` throughout.

    In float64 it is the yardstick of a typed graph: the graph's own weights, without its rounding errors.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, compute: torch.dtype):
        super().__init__()
        self.dtype, self.compute = dtype, compute
        self.model = copy.deepcopy(model)
        for _, tensor in _lowered_tensors(self.model):
            tensor.data = tensor.data.to(dtype).to(compute)
        self.model.to(compute)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.compute))
