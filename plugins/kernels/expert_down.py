"""`expert_down`: y[token] = hidden[slot] @ w_down[S_e] + b_out[e], scattered straight to token order.

With top_k > 1 the sum goes to partial[slot] in float32 and `combine` adds a token's slots in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.kernels.common import find_tile, round16
from plugins.kernels.spec import RUNTIME, KernelSpec


def reference(*, hidden, w_down, b_out, neurons, offsets, counts, buckets, y, partial, tokens, dim, experts, max_width,
              top_k) -> None:  # fmt: skip
    """hidden [T * top_k, round16(max_width)], w_down [U, D], b_out [K, D] of T; fills y [T, D] or, for top_k > 1,
    partial [T * top_k, D] float32."""
    target = y if top_k == 1 else partial
    for e in range(experts):
        keep = neurons[int(offsets[e]) : int(offsets[e + 1])].long()
        for slot in buckets[e, : int(counts[e])].tolist():
            value = hidden[slot, : len(keep)].double() @ w_down[keep].double() + b_out[e].double()
            target[slot] = value.to(target.dtype)


@triton.jit
def down_tile(hidden, w_down, b_out, neurons, offsets, y, partial, expert, slot, live, dim, max_width, top_k, BM: tl.constexpr,
              BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Rows `slot` [BM] (int64) of y or partial from the same rows of hidden: BN columns, all neurons of `expert`."""
    begin = tl.load(offsets + expert)
    width = tl.load(offsets + expert + 1) - begin
    padded = round16(width)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = column < dim

    inner = tl.arange(0, BK)
    h_row = hidden + slot[:, None] * round16(max_width)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, width, BK):
        # The up kernels wrote zeros between width and padded; beyond that hidden may hold anything.
        a = tl.load(h_row + (k + inner)[None, :], mask=live[:, None] & (k + inner < padded)[None, :], other=0.0)
        neuron = tl.load(neurons + begin + k + inner, mask=k + inner < width, other=0)
        b = tl.load(w_down + neuron.to(tl.int64)[:, None] * dim + column[None, :],
                    mask=(k + inner < width)[:, None] & inside[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(a, b, acc, input_precision="ieee")
    acc += tl.load(b_out + expert * dim + column, mask=inside, other=0.0).to(tl.float32)[None, :]

    out = slot[:, None] * dim + column[None, :]
    mask = live[:, None] & inside[None, :]
    if top_k == 1:
        tl.store(y + out, acc.to(y.dtype.element_ty), mask=mask)
    else:
        tl.store(partial + out, acc, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def expert_down_kernel(hidden, w_down, b_out, neurons, offsets, counts, buckets, y, partial, tokens, dim, experts,
                       max_width, top_k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (expert tiles, dim tiles): BM slots of one expert by BN columns of the output."""
    expert, first, count, busy = find_tile(tl.program_id(0), counts, experts, BM)
    if not busy:
        return
    place = first + tl.arange(0, BM)
    live = place < count
    slot = tl.load(buckets + expert.to(tl.int64) * tokens + place, mask=live, other=0).to(tl.int64)
    down_tile(hidden, w_down, b_out, neurons, offsets, y, partial, expert, slot, live, dim, max_width, top_k, BM, BN, BK)


SPEC = KernelSpec("expert_down", expert_down_kernel, reference, ("expert_tiles", "dim_tiles", "one"))
