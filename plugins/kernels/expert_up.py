"""`expert_up`: hidden[slot] = act(x[token] @ w_up[S_e].T + b_up[S_e]), gathering tokens and neuron rows as it reads."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.kernels.common import activate, activate_reference, find_tile, round16
from plugins.kernels.spec import RUNTIME, KernelSpec


def reference(*, x, w_up, b_up, neurons, offsets, counts, buckets, hidden, tokens, dim, experts, max_width, top_k,
              activation) -> None:  # fmt: skip
    """x [T, D], w_up [U, D] of T; fills hidden [T * top_k, round16(max_width)], zeros up to the next multiple of 16."""
    for e in range(experts):
        keep = neurons[int(offsets[e]) : int(offsets[e + 1])].long()
        width = len(keep)
        for slot in buckets[e, : int(counts[e])].tolist():
            value = w_up[keep].double() @ x[slot // top_k].double() + b_up[keep].double()
            hidden[slot, : -(-width // 16) * 16] = 0
            hidden[slot, :width] = activate_reference(value, activation).to(hidden.dtype)


@triton.jit
def up_tile(x, w_up, b_up, neurons, hidden, token, slot, live, begin, width, dim, max_width, activation, BM: tl.constexpr,
            BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Rows `slot` [BM] of hidden from rows `token` [BM] of x: BN neurons of the expert whose neurons start at `begin`."""
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    neuron = tl.load(neurons + begin + column, mask=column < width, other=0)

    # Rows that are not live and columns beyond the expert read row 0: finite or not, they touch no other row.
    inner = tl.arange(0, BK)
    x_row = x + token.to(tl.int64)[:, None] * dim
    w_row = w_up + neuron.to(tl.int64)[None, :] * dim
    acc = tl.zeros((BM, BN), tl.float32)
    for d in range(0, dim, BK):
        inside = d + inner < dim
        a = tl.load(x_row + (d + inner)[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(w_row + (d + inner)[:, None], mask=inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    acc += tl.load(b_up + neuron, mask=column < width, other=0.0).to(tl.float32)[None, :]
    value = tl.where((column < width)[None, :], activate(acc, activation), 0.0)

    # Zeros up to the next multiple of 16, so that the down kernels may read whole vectors.
    out = hidden + slot.to(tl.int64)[:, None] * round16(max_width) + column[None, :]
    tl.store(out, value.to(hidden.dtype.element_ty), mask=live[:, None] & (column < round16(width))[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def expert_up_kernel(x, w_up, b_up, neurons, offsets, counts, buckets, hidden, tokens, dim, experts, max_width, top_k,
                     activation, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (expert tiles, width tiles): BM slots of one expert by BN of its neurons."""
    expert, first, count, busy = find_tile(tl.program_id(0), counts, experts, BM)
    if not busy:
        return
    begin = tl.load(offsets + expert)
    width = tl.load(offsets + expert + 1) - begin
    if tl.program_id(1) * BN >= width:
        return
    place = first + tl.arange(0, BM)
    live = place < count
    slot = tl.load(buckets + expert.to(tl.int64) * tokens + place, mask=live, other=0)
    up_tile(x, w_up, b_up, neurons, hidden, slot // top_k, slot, live, begin, width, dim, max_width, activation, BM, BN, BK)


SPEC = KernelSpec("expert_up", expert_up_kernel, reference, ("expert_tiles", "width_tiles", "one"))
