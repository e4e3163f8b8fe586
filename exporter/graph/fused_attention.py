"""PyTorch's fused attention in ONNX for tensors of any rank: its exporter takes four dimensions alone.

Attention over windows has more, [B, H, windows, N, d] (Hiera, Twins), some models have three.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

from moee.errors import UserError

USUAL_RANK = 4
_onnx = onnxscript.values.Opset("", 20)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """softmax(query keyᵀ · scale + mask) value over the last two dimensions [N, d], in the order in which torch computes it."""
    ranks = {len(tensor.shape) for tensor in (query, key, value)}
    if ranks == {USUAL_RANK}:
        return aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    width = query.shape[-1]
    if len(ranks) > 1 or is_causal or enable_gqa or not isinstance(width, int):
        raise UserError("fused attention of tensors that have not four dimensions is exported where it is plain")
    rank = ranks.pop()
    root = math.sqrt(1 / math.sqrt(width) if scale is None else scale)  # of the scale, for query and key each
    factor = _onnx.CastLike(_onnx.Constant(value_float=root), query)
    turned = _onnx.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = _onnx.MatMul(_onnx.Mul(query, factor), _onnx.Mul(turned, factor))
    if attn_mask is not None:
        if attn_mask.dtype == ir.DataType.BOOL:
            nothing = _onnx.CastLike(_onnx.Constant(value_float=0.0), query)
            lowest = _onnx.CastLike(_onnx.Constant(value_float=float("-inf")), query)
            attn_mask = _onnx.Where(attn_mask, nothing, lowest)
        scores = _onnx.Add(scores, attn_mask)
    return _onnx.MatMul(_onnx.Softmax(scores, axis=-1), value)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
}
