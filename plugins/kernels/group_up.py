"""`group_up`: `route` and `expert_up` in one launch, for one expert a token. Needs no counters and no buckets."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.kernels import expert_up
from plugins.kernels.expert_up import up_tile
from plugins.kernels.group import arrange, buckets_reference, choose, route_reference, tile_tokens
from plugins.kernels.spec import RUNTIME, KernelSpec


def reference(*, x, router, router_bias, load_cdf, w_up, b_up, neurons, offsets, routes, hidden, tokens, dim, experts,
              max_width, activation, by_load) -> None:  # fmt: skip
    """x [T, D]; fills routes [T] and hidden [T, round16(max_width)]: the kernels it replaces, one after the other."""
    route_reference(x=x, router=router, router_bias=router_bias, load_cdf=load_cdf, neurons=neurons, offsets=offsets,
                    routes=routes, tokens=tokens, dim=dim, experts=experts, by_load=by_load)  # fmt: skip
    expert_up.reference(x=x, w_up=w_up, b_up=b_up, neurons=neurons, offsets=offsets, hidden=hidden, tokens=tokens, dim=dim,
                        experts=experts, max_width=max_width, top_k=1, activation=activation,
                        **buckets_reference(routes, tokens, experts))  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def group_up_kernel(x, router, router_bias, load_cdf, w_up, b_up, neurons, offsets, routes, hidden, tokens, dim, experts,
                    max_width, activation, by_load, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                    GROUP: tl.constexpr, ROWS: tl.constexpr, SCORED: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """Grid (token tiles, width tiles): GROUP / BM programs share a group's tiles, each has BN neurons of every expert."""
    group = tl.program_id(0) // (GROUP // BM)
    part = tl.program_id(0) % (GROUP // BM)
    parts = tl.minimum(GROUP // BM, tl.num_programs(0) - group * (GROUP // BM))
    token = group * GROUP + tl.arange(0, GROUP)
    live = token < tokens
    chosen = choose(x, router, router_bias, load_cdf, token, live, dim, experts, by_load, GROUP, SCORED, BS)
    if (part == 0) & (tl.program_id(1) == 0):
        tl.store(routes + token, chosen, mask=live)
    place, tiles = arrange(chosen, live, experts, GROUP, SCORED, ROWS)
    for tile in range(part, tiles, parts):
        expert, index, here = tile_tokens(place, chosen, tile, GROUP, ROWS)
        begin = tl.load(offsets + expert)
        width = tl.load(offsets + expert + 1) - begin
        if tl.program_id(1) * BN < width:
            slot = group * GROUP + index
            up_tile(x, w_up, b_up, neurons, hidden, slot, slot, here, begin, width, dim, max_width, activation, ROWS, BN, BK)


SPEC = KernelSpec("group_up", group_up_kernel, reference, ("token_tiles", "width_tiles", "one"))
