"""Device functions of the `group` kernels: a program routes a whole group of tokens by itself and sorts them into tiles.

A group is GROUP tokens that follow one another. Every program that works on it scores all of them again: K D multiplications a
token are few beside the experts' own. So nothing is counted in memory, nothing has to be cleared, and no launch goes before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from plugins.kernels import route, route_load
from plugins.kernels.route import score_block
from plugins.kernels.route_load import GOLDEN, MILLION, count_passed

GROUP = 128  # tokens; 256 leave fewer rows of tiles empty, but their kernels are half as large again
SCORED = 16  # experts that are scored at a time: the narrowest product that tensor cores take


def route_reference(*, x, router, router_bias, load_cdf, neurons, offsets, routes, tokens, dim, experts, by_load) -> None:
    """Fills routes [T] as `route` or, where by_load is 1, as `route_load` does for one expert a token."""
    counts = torch.zeros(experts, dtype=torch.int32)
    buckets = torch.zeros(experts, tokens, dtype=torch.int32)
    common = dict(neurons=neurons, offsets=offsets, counts=counts, member=None, buckets=buckets, routes=routes, tokens=tokens,
                  experts=experts, union_size=0, top_k=1)  # fmt: skip
    if by_load:
        route_load.reference(load_cdf=load_cdf, **common)
    else:
        route.reference(x=x, router=router, router_bias=router_bias, dim=dim, **common)


def buckets_reference(routes, tokens, experts) -> dict[str, torch.Tensor]:
    """counts [K] and buckets [K, T] of routes [T], as the `tile` kernels' references take them."""
    counts, buckets = torch.zeros(experts, dtype=torch.int32), torch.zeros(experts, tokens, dtype=torch.int32)
    route.fill_reference(None, None, counts, None, buckets, routes, tokens, experts, False)
    return {"counts": counts, "buckets": buckets}


@triton.jit
def choose(x, router, router_bias, load_cdf, token, live, dim, experts, by_load, BM: tl.constexpr, BN: tl.constexpr,
           BK: tl.constexpr):  # fmt: skip
    """The expert [BM] of tokens `token` [BM], as `route` chooses for top_k = 1, or as `route_load` where `by_load` is 1."""
    chosen = tl.zeros((BM,), tl.int32)
    if by_load == 1:
        point = ((token % MILLION).to(tl.int64) * GOLDEN % MILLION).to(tl.int32)
        chosen = tl.minimum(count_passed(load_cdf, point, experts, BM, BN), experts - 1)
    else:
        row = tl.where(live, token, 0).to(tl.int64)
        best = tl.full((BM,), float("-inf"), tl.float32)
        finite = tl.full((BM,), 1, tl.int32)
        for k in range(0, experts, BN):
            scores = score_block(x, router, router_bias, row, dim, experts, k, BM, BN, BK)
            column = k + tl.arange(0, BN)
            finite = tl.minimum(finite, tl.min((tl.abs(scores) < float("inf")).to(tl.int32), 1))
            value = tl.where((column < experts)[None, :], scores, float("-inf"))
            most = tl.max(value, 1)
            index = tl.min(tl.where(value == most[:, None], column[None, :], 2147483647), 1)
            chosen = tl.where(most > best, index, chosen)
            best = tl.maximum(best, most)
        chosen = tl.where(finite == 1, chosen, 0)
    return chosen


@triton.jit
def arrange(chosen, live, experts, BM: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr):
    """Tokens by expert in their own order, each expert's on tiles of ROWS of its own.

    Returns each token's place [BM], tile * ROWS + row, -1 for a token that is not `live` or has no expert, and the number of
    tiles.
    """
    place = tl.full((BM,), -1, tl.int32)
    tiles = experts * 0
    for k in range(0, experts, BN):
        column = k + tl.arange(0, BN)
        hit = ((chosen[:, None] == column[None, :]) & (live[:, None] & (column < experts)[None, :])).to(tl.int32)
        rank = tl.cumsum(hit, 0) - hit
        own = (tl.sum(hit, 0) + ROWS - 1) // ROWS
        first = tiles + tl.cumsum(own, 0) - own
        place += tl.sum(tl.where(hit > 0, first[None, :] * ROWS + rank + 1, 0), 1)
        tiles += tl.sum(own, 0)
    return place, tiles


@triton.jit
def tile_tokens(place, chosen, tile, BM: tl.constexpr, ROWS: tl.constexpr):
    """Expert of a tile that `arrange` made, and for each of its rows the token's index in the group and whether there is one."""
    row = tile * ROWS + tl.arange(0, ROWS)
    after = tl.sum(tl.where(place[None, :] == row[:, None], tl.arange(0, BM)[None, :] + 1, 0), 1)
    inside = (place >= tile * ROWS) & (place < tile * ROWS + ROWS)
    return tl.max(tl.where(inside, chosen, 0), 0), tl.maximum(after - 1, 0), after > 0

