"""`route_load`: the stand-in for `route` while TensorRT times the tactics.

The builder's input is arbitrary, so its routing would be too. This kernel spreads the tokens as the calibration set
did: with u the token's place in [0, 1/top_k) of the cumulative load (a golden-ratio sequence, so every prefix is
balanced), its experts are those at u, u + 1/top_k, ... Since no expert takes more than 1/top_k of all slots these are
distinct; rounding is caught by a clamp, so that no bucket can overflow. It does not read x: the router's product is
the same for every tactic and does not change their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from plugins.kernels.route import append, fill_reference, mark_members
from plugins.kernels.spec import RUNTIME, KernelSpec

# 2^64 / golden ratio is the usual multiplier; here the same ratio of one million, coprime to it.
GOLDEN = tl.constexpr(618033)
MILLION = tl.constexpr(1000000)


def reference(*, load_cdf, neurons, offsets, counts, member, buckets, routes, tokens, experts, union_size, top_k,
              members=False) -> None:  # fmt: skip
    """load_cdf [K] int32, cumulative parts per million; fills the same buffers as `route`."""
    cdf = load_cdf.long()
    start = (torch.arange(tokens) % 1_000_000) * 618_033 % 1_000_000 // top_k
    last = torch.full((tokens,), -1)
    for j in range(top_k):
        found = (cdf[None, :] <= (start + j * (1_000_000 // top_k))[:, None]).sum(1)
        last = torch.minimum(torch.maximum(found, last + 1), torch.tensor(experts - top_k + j))
        routes[j::top_k] = last.int()
    fill_reference(neurons, offsets, counts, member, buckets, routes, tokens, experts, members)


@triton.jit
def count_passed(load_cdf, point, experts, BM: tl.constexpr, BN: tl.constexpr):
    """How many experts' cumulative loads end at or before `point` [BM], parts per million."""
    column = tl.arange(0, BN)
    found = tl.zeros((BM,), tl.int32)
    for k in range(0, experts, BN):
        cdf = tl.load(load_cdf + k + column, mask=k + column < experts, other=2147483647)
        found += tl.sum((cdf[None, :] <= point[:, None]).to(tl.int32), 1)
    return found


@triton.jit(do_not_specialize=RUNTIME)
def route_load_kernel(load_cdf, neurons, offsets, counts, member, buckets, routes, tokens, experts, union_size, top_k,
                      BM: tl.constexpr, BN: tl.constexpr, MEMBERS: tl.constexpr):  # fmt: skip
    """Grid as `route`."""
    if MEMBERS:
        mark_members(neurons, offsets, member, experts, union_size, 64, BN)
        if tl.program_id(1) > 0:
            return
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    live = token < tokens
    start = ((token % MILLION).to(tl.int64) * GOLDEN % MILLION).to(tl.int32) // top_k
    chosen = tl.full((BM,), -1, tl.int32)
    for j in range(0, top_k):
        point = start + j * (MILLION // top_k)
        found = count_passed(load_cdf, point, experts, BM, BN)
        chosen = tl.minimum(tl.maximum(found, chosen + 1), experts - top_k + j)
        slot = token * top_k + j
        tl.store(routes + slot, chosen, mask=live)
        if not MEMBERS:
            append(chosen, slot, live, counts, buckets, tokens, experts, BM, BN)


SPEC = KernelSpec("route_load", route_load_kernel, reference, ("token_tiles", "one", "one"))
