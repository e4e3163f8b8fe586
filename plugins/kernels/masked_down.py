"""`masked_down`: y[t] = hidden[t] @ w_down + sum over the token's experts of b_out[e], in token order."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.kernels.common import round16
from plugins.kernels.spec import RUNTIME, KernelSpec


def reference(*, hidden, w_down, b_out, routes, y, tokens, dim, union_size, top_k) -> None:
    """hidden [T, round16(U)], w_down [U, D], b_out [K, D] of T; fills y [T, D]."""
    bias = b_out[routes.long()].view(tokens, top_k, dim).double().sum(1)
    y.copy_((hidden[:, :union_size].double() @ w_down.double() + bias).to(y.dtype))


@triton.jit(do_not_specialize=RUNTIME)
def masked_down_kernel(hidden, w_down, b_out, routes, y, tokens, dim, union_size, top_k, BM: tl.constexpr,
                       BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (token tiles, dim tiles)."""
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    live = token < tokens
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = column < dim
    padded = round16(union_size)

    inner = tl.arange(0, BK)
    row = tl.where(live, token, 0).to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, union_size, BK):
        a = tl.load(
            hidden + row[:, None] * padded + (k + inner)[None, :], mask=(k + inner < padded)[None, :], other=0.0
        )
        b = tl.load(w_down + (k + inner).to(tl.int64)[:, None] * dim + column[None, :],
                    mask=(k + inner < union_size)[:, None] & inside[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(a, b, acc, input_precision="ieee")
    mask = live[:, None] & inside[None, :]
    for j in range(0, top_k):
        expert = tl.load(routes + token * top_k + j, mask=live, other=0)
        acc += tl.load(b_out + expert[:, None] * dim + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + token.to(tl.int64)[:, None] * dim + column[None, :], acc.to(y.dtype.element_ty), mask=mask)


SPEC = KernelSpec("masked_down", masked_down_kernel, reference, ("token_tiles", "dim_tiles", "one"))
