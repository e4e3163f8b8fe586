"""A stable sort in ONNX, for which PyTorch's exporter has no form: TopK of the whole axis.

Of equal values the lower place comes first, as ONNX says and a stable sort does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript
import torch

from moee.errors import UserError

_onnx = onnxscript.values.Opset("", 20)


def _sort(x, stable=None, dim=-1, descending=False):
    """Values and places of `x` along an axis whose length the graph knows."""
    length = x.shape[dim]
    if not isinstance(length, int):
        raise UserError("a sort is exported along an axis of a length that does not change")
    count = _onnx.Constant(value=ir.tensor(np.array([length], np.int64)))
    return _onnx.TopK(x, count, axis=dim, largest=int(descending), sorted=1)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.sort.stable: _sort}
