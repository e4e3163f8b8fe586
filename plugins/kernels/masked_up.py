"""`masked_up`: the dense-masked form for few tokens: every union neuron for every token, zero where no expert keeps it.

It reads each weight row once instead of once an expert. A token with several experts counts a shared neuron as often
as it was chosen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.kernels.common import activate, activate_reference, round16
from plugins.kernels.spec import RUNTIME, KernelSpec


def reference(*, x, w_up, b_up, member, routes, hidden, tokens, dim, union_size, top_k, activation) -> None:
    """x [T, D], w_up [U, D] of T, member [K, U] uint8; fills hidden [T, round16(U)], zeros behind U."""
    weight = member[routes.long()].view(tokens, top_k, union_size).double().sum(1)
    value = activate_reference(x.double() @ w_up.double().T + b_up.double(), activation)
    hidden.zero_()
    hidden[:, :union_size] = (value * weight).masked_fill(weight == 0, 0).to(hidden.dtype)


@triton.jit(do_not_specialize=RUNTIME)
def masked_up_kernel(x, w_up, b_up, member, routes, hidden, tokens, dim, union_size, top_k, activation,
                     BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (token tiles, union tiles)."""
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    live = token < tokens
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    here = column < union_size

    inner = tl.arange(0, BK)
    x_row = x + tl.where(live, token, 0).to(tl.int64)[:, None] * dim
    w_row = w_up + tl.where(here, column, 0).to(tl.int64)[None, :] * dim
    acc = tl.zeros((BM, BN), tl.float32)
    for d in range(0, dim, BK):
        inside = d + inner < dim
        a = tl.load(x_row + (d + inner)[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(w_row + (d + inner)[:, None], mask=inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    acc += tl.load(b_up + column, mask=here, other=0.0).to(tl.float32)[None, :]

    weight = tl.zeros((BM, BN), tl.float32)
    for j in range(0, top_k):
        expert = tl.load(routes + token * top_k + j, mask=live, other=0).to(tl.int64)
        kept = tl.load(
            member + expert[:, None] * union_size + column[None, :], mask=live[:, None] & here[None, :], other=0
        )
        weight += kept.to(tl.float32)
    # A dropped neuron is 0 even where its activation overflowed, hence no plain product.
    value = tl.where(weight > 0.0, activate(acc, activation) * weight, 0.0)
    out = hidden + token.to(tl.int64)[:, None] * round16(union_size) + column[None, :]
    tl.store(out, value.to(hidden.dtype.element_ty), mask=live[:, None] & (column < round16(union_size))[None, :])


SPEC = KernelSpec("masked_up", masked_up_kernel, reference, ("token_tiles", "union_tiles", "one"))
