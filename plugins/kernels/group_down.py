"""`group_down`: `expert_down` for one expert a token, from the routes alone: each program sorts its group of tokens again."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.kernels import expert_down
from plugins.kernels.expert_down import down_tile
from plugins.kernels.group import arrange, buckets_reference, tile_tokens
from plugins.kernels.spec import RUNTIME, KernelSpec


def reference(*, hidden, w_down, b_out, neurons, offsets, routes, y, tokens, dim, experts, max_width) -> None:
    """hidden [T, round16(max_width)], routes [T]; fills y [T, D]."""
    expert_down.reference(hidden=hidden, w_down=w_down, b_out=b_out, neurons=neurons, offsets=offsets, y=y, partial=None,
                          tokens=tokens, dim=dim, experts=experts, max_width=max_width, top_k=1,
                          **buckets_reference(routes, tokens, experts))  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def group_down_kernel(hidden, w_down, b_out, neurons, offsets, routes, y, tokens, dim, experts, max_width,
                      BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                      SCORED: tl.constexpr):  # fmt: skip
    """Grid (token tiles, dim tiles): GROUP / BM programs share a group's tiles, each has BN columns of the output."""
    group = tl.program_id(0) // (GROUP // BM)
    part = tl.program_id(0) % (GROUP // BM)
    parts = tl.minimum(GROUP // BM, tl.num_programs(0) - group * (GROUP // BM))
    token = group * GROUP + tl.arange(0, GROUP)
    live = token < tokens
    chosen = tl.load(routes + token, mask=live, other=-1)
    place, tiles = arrange(chosen, live, experts, GROUP, SCORED, ROWS)
    for tile in range(part, tiles, parts):
        expert, index, here = tile_tokens(place, chosen, tile, GROUP, ROWS)
        slot = (group * GROUP + index).to(tl.int64)
        down_tile(hidden, w_down, b_out, neurons, offsets, y, y, expert, slot, here, dim, max_width, 1, ROWS, BN, BK)


SPEC = KernelSpec("group_down", group_down_kernel, reference, ("token_tiles", "dim_tiles", "one"))
