"""`combine`: y[t] = sum over j of partial[t * top_k + j], j ascending, for top_k > 1."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.kernels.spec import RUNTIME, KernelSpec


def reference(*, partial, y, tokens, dim, top_k) -> None:
    """partial [T * top_k, D] float32; fills y [T, D] of T."""
    y.copy_(partial.view(tokens, top_k, dim).double().sum(1).to(y.dtype))


@triton.jit(do_not_specialize=RUNTIME)
def combine_kernel(partial, y, tokens, dim, top_k, BM: tl.constexpr, BN: tl.constexpr):
    """Grid (token tiles, dim tiles)."""
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (token < tokens)[:, None] & (column < dim)[None, :]
    row = token.to(tl.int64)[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for j in range(0, top_k):
        acc += tl.load(partial + (row * top_k + j) * dim + column[None, :], mask=mask, other=0.0)
    tl.store(y + row * dim + column[None, :], acc.to(y.dtype.element_ty), mask=mask)


SPEC = KernelSpec("combine", combine_kernel, reference, ("token_tiles", "dim_tiles", "one"))
