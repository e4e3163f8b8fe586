"""`group_fused`: the whole layer in one launch, for one expert a token and narrow tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.kernels import fused
from plugins.kernels.fused import fused_tile
from plugins.kernels.group import arrange, buckets_reference, choose, route_reference, tile_tokens
from plugins.kernels.spec import RUNTIME, KernelSpec


def reference(*, x, router, router_bias, load_cdf, w_up, b_up, w_down, b_out, neurons, offsets, routes, y, tokens, dim,
              experts, activation, by_load) -> None:  # fmt: skip
    """x [T, D]; fills routes [T] and y [T, D]."""
    route_reference(x=x, router=router, router_bias=router_bias, load_cdf=load_cdf, neurons=neurons, offsets=offsets,
                    routes=routes, tokens=tokens, dim=dim, experts=experts, by_load=by_load)  # fmt: skip
    fused.reference(x=x, w_up=w_up, b_up=b_up, w_down=w_down, b_out=b_out, neurons=neurons, offsets=offsets, y=y, partial=None,
                    tokens=tokens, dim=dim, experts=experts, top_k=1, activation=activation,
                    **buckets_reference(routes, tokens, experts))  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def group_fused_kernel(x, router, router_bias, load_cdf, w_up, b_up, w_down, b_out, neurons, offsets, routes, y, tokens,
                       dim, experts, activation, by_load, BM: tl.constexpr, BN: tl.constexpr, D0: tl.constexpr,
                       D1: tl.constexpr, GROUP: tl.constexpr, SCORED: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """Grid (expert tiles): one group has as many programs as tiles of BM rows, of several groups each has its share."""
    groups = (tokens + GROUP - 1) // GROUP
    size = (tokens + groups - 1) // groups  # alike, so that no program waits for the largest
    group = tl.program_id(0) % groups
    part = tl.program_id(0) // groups
    parts = (tl.num_programs(0) - group + groups - 1) // groups
    inside = tl.arange(0, GROUP)
    token = group * size + inside
    live = (inside < size) & (token < tokens)
    chosen = choose(x, router, router_bias, load_cdf, token, live, dim, experts, by_load, GROUP, SCORED, BS)
    if part == 0:
        tl.store(routes + token, chosen, mask=live)
    place, tiles = arrange(chosen, live, experts, GROUP, SCORED, BM)
    for tile in range(part, tiles, parts):
        expert, index, here = tile_tokens(place, chosen, tile, GROUP, BM)
        slot = (group * size + index).to(tl.int64)
        fused_tile(x, w_up, b_up, w_down, b_out, neurons, offsets, y, y, expert, slot, slot, here, dim, 1, activation, BM, BN, D0,
                   D1)  # fmt: skip


SPEC = KernelSpec("group_fused", group_fused_kernel, reference, ("expert_tiles", "one", "one"))
