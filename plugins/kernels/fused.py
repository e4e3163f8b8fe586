"""`fused`: up and down in one program, for narrow tokens: the hidden values never leave the chip.

The program holds the whole token row. Block sizes are powers of two, so a row of up to 384 is two pieces, 256 + 128
(192: 128 + 64), which wastes nothing at the widths that ViTs have.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.kernels import expert_down, expert_up
from plugins.kernels.common import activate, find_tile
from plugins.kernels.spec import RUNTIME, KernelSpec


def reference(*, x, w_up, b_up, w_down, b_out, neurons, offsets, counts, buckets, y, partial, tokens, dim, experts,
              top_k, activation) -> None:  # fmt: skip
    """The two kernels it replaces, one after the other; the hidden values are rounded to T as there."""
    max_width = int((offsets[1:] - offsets[:-1]).max())
    hidden = x.new_zeros(tokens * top_k, max(16, -(-max_width // 16) * 16))
    common = dict(neurons=neurons, offsets=offsets, counts=counts, buckets=buckets, hidden=hidden, tokens=tokens,
                  dim=dim, experts=experts, max_width=max_width, top_k=top_k)  # fmt: skip
    expert_up.reference(x=x, w_up=w_up, b_up=b_up, activation=activation, **common)
    expert_down.reference(w_down=w_down, b_out=b_out, y=y, partial=partial, **common)


@triton.jit
def store_piece(acc, b_out, y, partial, expert, slot, live, column, dim, top_k):
    """Add the output bias to acc [BM, C] and scatter it, as expert_down does."""
    acc += tl.load(b_out + expert * dim + column, mask=column < dim, other=0.0).to(tl.float32)[None, :]
    out = slot[:, None] * dim + column[None, :]
    mask = live[:, None] & (column < dim)[None, :]
    if top_k == 1:
        tl.store(y + out, acc.to(y.dtype.element_ty), mask=mask)
    else:
        tl.store(partial + out, acc, mask=mask)


@triton.jit
def fused_tile(x, w_up, b_up, w_down, b_out, neurons, offsets, y, partial, expert, token, slot, live, dim, top_k, activation,
               BM: tl.constexpr, BN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):  # fmt: skip
    """Rows `slot` [BM] of y or partial from rows `token` [BM] of x, both int64: all neurons of `expert`, BN at a time."""
    begin = tl.load(offsets + expert)
    width = tl.load(offsets + expert + 1) - begin
    c0 = tl.arange(0, D0)
    c1 = D0 + tl.arange(0, D1)
    row = token[:, None] * dim
    x0 = tl.load(x + row + c0[None, :], mask=(c0 < dim)[None, :], other=0.0)
    x1 = tl.load(x + row + c1[None, :], mask=(c1 < dim)[None, :], other=0.0)
    acc0 = tl.zeros((BM, D0), tl.float32)
    acc1 = tl.zeros((BM, D1), tl.float32)
    for n in range(0, width, BN):
        index = n + tl.arange(0, BN)
        kept = index < width
        neuron = tl.load(neurons + begin + index, mask=kept, other=0)
        w_row = neuron.to(tl.int64)[:, None] * dim
        m0 = kept[:, None] & (c0 < dim)[None, :]
        m1 = kept[:, None] & (c1 < dim)[None, :]
        u0 = tl.load(w_up + w_row + c0[None, :], mask=m0, other=0.0)
        u1 = tl.load(w_up + w_row + c1[None, :], mask=m1, other=0.0)
        h = tl.dot(x0, tl.trans(u0), input_precision="ieee")
        h = tl.dot(x1, tl.trans(u1), h, input_precision="ieee")
        h += tl.load(b_up + neuron, mask=kept, other=0.0).to(tl.float32)[None, :]
        # Columns beyond the expert hold act(0) = 0 against rows of zeros.
        h = activate(h, activation).to(x.dtype.element_ty)
        v0 = tl.load(w_down + w_row + c0[None, :], mask=m0, other=0.0)
        v1 = tl.load(w_down + w_row + c1[None, :], mask=m1, other=0.0)
        acc0 = tl.dot(h, v0, acc0, input_precision="ieee")
        acc1 = tl.dot(h, v1, acc1, input_precision="ieee")
    store_piece(acc0, b_out, y, partial, expert, slot, live, c0, dim, top_k)
    store_piece(acc1, b_out, y, partial, expert, slot, live, c1, dim, top_k)


@triton.jit(do_not_specialize=RUNTIME)
def fused_kernel(x, w_up, b_up, w_down, b_out, neurons, offsets, counts, buckets, y, partial, tokens, dim, experts,
                 top_k, activation, BM: tl.constexpr, BN: tl.constexpr, D0: tl.constexpr,
                 D1: tl.constexpr):  # fmt: skip
    """Grid (expert tiles): BM slots of one expert, all of D <= D0 + D1; BN neurons at a time."""
    expert, first, count, busy = find_tile(tl.program_id(0), counts, experts, BM)
    if not busy:
        return
    place = first + tl.arange(0, BM)
    live = place < count
    slot = tl.load(buckets + expert.to(tl.int64) * tokens + place, mask=live, other=0).to(tl.int64)
    fused_tile(x, w_up, b_up, w_down, b_out, neurons, offsets, y, partial, expert, slot // top_k, slot, live, dim, top_k,
               activation, BM, BN, D0, D1)  # fmt: skip


SPEC = KernelSpec("fused", fused_kernel, reference, ("expert_tiles", "one", "one"))
