"""`route`: score every token, choose its experts, append it to their buckets.

A bucket has room for every token (an expert gets each token at most once), so appending needs no prefix sum over
experts and no second pass. A program counts its tokens per expert first and claims their places with one integer
addition an expert; the order inside a bucket depends on the program order, the results do not.

The `members` variant serves the dense-masked tactics, which need no buckets: it writes the choice, and all programs
together mark which expert keeps which neuron.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from plugins.kernels.spec import RUNTIME, KernelSpec


def reference(*, x, router, router_bias, neurons, offsets, counts, member, buckets, routes, tokens, dim, experts,
              union_size, top_k, members=False) -> None:  # fmt: skip
    """x [T, D], router [K, D] of T; fills routes [T * top_k], and counts [K] and buckets [K, T] or member [K, U]."""
    scores = x.float() @ router.float().T + router_bias
    scores = torch.where(torch.isfinite(scores).all(1, keepdim=True), scores, 0.0)
    # A stable descending sort puts the lowest id first among equals.
    chosen = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :top_k]
    routes.copy_(chosen.reshape(-1))
    fill_reference(neurons, offsets, counts, member, buckets, routes, tokens, experts, members)


def fill_reference(neurons, offsets, counts, member, buckets, routes, tokens, experts, members) -> None:
    """From routes [T * top_k]: either member [K, U], or counts [K] and buckets [K, T]; both zeroed before."""
    if members:
        for e in range(experts):
            member[e, neurons[int(offsets[e]) : int(offsets[e + 1])].long()] = 1
        return
    for slot, e in enumerate(routes.tolist()):
        buckets[e, int(counts[e])] = slot
        counts[e] += 1


@triton.jit
def append(chosen, slot, live, counts, buckets, tokens, experts, BM: tl.constexpr, BN: tl.constexpr):
    """Put each live slot [BM] into the bucket of its expert `chosen` [BM]."""
    column = tl.arange(0, BN)
    for k in range(0, experts, BN):
        hit = ((chosen[:, None] == k + column[None, :]) & live[:, None]).to(tl.int32)
        rank = tl.cumsum(hit, 0) - hit
        total = tl.sum(hit, 0)
        base = tl.atomic_add(counts + k + column, total, mask=total > 0, sem="relaxed")
        place = tl.sum(tl.where(hit > 0, rank + base[None, :], 0), 1)
        here = live & (chosen >= k) & (chosen < k + BN)
        # The bound holds by construction; it keeps a counter that was never zeroed from writing outside the bucket.
        here = here & (place >= 0) & (place < tokens)
        tl.store(buckets + chosen.to(tl.int64) * tokens + place, slot, mask=here)


@triton.jit
def mark_members(neurons, offsets, member, experts, union_size, BC: tl.constexpr, BN: tl.constexpr):
    """All programs of the grid together: member[e, neurons[i]] = 1 for i in [offsets[e], offsets[e + 1])."""
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    step = tl.num_programs(0) * tl.num_programs(1) * BC
    total = tl.load(offsets + experts)
    column = tl.arange(0, BN)
    for start in range(program * BC, total, step):
        index = start + tl.arange(0, BC)
        expert = tl.zeros((BC,), tl.int32)
        for k in range(0, experts, BN):
            end = tl.load(offsets + 1 + k + column, mask=k + column < experts, other=2147483647)
            expert += tl.sum((end[None, :] <= index[:, None]).to(tl.int32), 1)
        neuron = tl.load(neurons + index, mask=index < total, other=0)
        one = tl.full((BC,), 1, tl.uint8)
        tl.store(member + expert.to(tl.int64) * union_size + neuron, one, mask=index < total)


@triton.jit
def score_block(x, router, router_bias, row, dim, experts, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Scores [BM, BN] of tokens `row` [BM] (int64) against experts k .. k + BN - 1, in float32."""
    column = k + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    here = column < experts
    acc = tl.zeros((BM, BN), tl.float32)
    for d in range(0, dim, BK):
        inside = d + inner < dim
        a = tl.load(x + row[:, None] * dim + (d + inner)[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(
            router + column[None, :] * dim + (d + inner)[:, None], mask=inside[:, None] & here[None, :], other=0.0
        )
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc + tl.load(router_bias + column, mask=here, other=0.0)[None, :]


@triton.jit
def pick(scores, finite, k, experts, last_score, last_expert, BN: tl.constexpr):
    """Best (score, expert) of a block that ranks after (last_score, last_expert); -inf, huge id if there is none."""
    column = k + tl.arange(0, BN)
    value = tl.where(finite[:, None], scores, 0.0)
    after = (value < last_score[:, None]) | ((value == last_score[:, None]) & (column[None, :] > last_expert[:, None]))
    value = tl.where(after & (column < experts)[None, :], value, float("-inf"))
    best = tl.max(value, 1)
    index = tl.min(tl.where(value == best[:, None], column[None, :], 2147483647), 1)
    return best, index


@triton.jit(do_not_specialize=RUNTIME)
def route_kernel(x, router, router_bias, neurons, offsets, counts, member, buckets, routes, tokens, dim, experts,
                 union_size, top_k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 MEMBERS: tl.constexpr):  # fmt: skip
    """Grid (token tiles, 1), with MEMBERS (token tiles, union tiles). BN experts are scored at a time."""
    if MEMBERS:
        mark_members(neurons, offsets, member, experts, union_size, 64, BN)
        if tl.program_id(1) > 0:
            return
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    live = token < tokens
    row = tl.where(live, token, 0).to(tl.int64)

    # First pass: scores of the first block, and whether all scores of a token are finite.
    scores = score_block(x, router, router_bias, row, dim, experts, 0, BM, BN, BK)
    finite = tl.sum((tl.abs(scores) < float("inf")).to(tl.int32), 1) == BN
    for k in range(BN, experts, BN):
        more = score_block(x, router, router_bias, row, dim, experts, k, BM, BN, BK)
        finite = finite & (tl.sum((tl.abs(more) < float("inf")).to(tl.int32), 1) == BN)

    # Then top_k rounds, each taking the best that ranks after the last one. Beyond BN experts the scores are
    # computed again in each round: cheaper than a scores buffer at the sizes that occur.
    last_score = tl.full((BM,), float("inf"), tl.float32)
    last_expert = tl.full((BM,), -1, tl.int32)
    for j in range(0, top_k):
        best, chosen = pick(scores, finite, 0, experts, last_score, last_expert, BN)
        for k in range(BN, experts, BN):
            more = score_block(x, router, router_bias, row, dim, experts, k, BM, BN, BK)
            value, index = pick(more, finite, k, experts, last_score, last_expert, BN)
            chosen = tl.where(value > best, index, chosen)
            best = tl.maximum(best, value)
        chosen = tl.minimum(chosen, experts - 1)
        slot = token * top_k + j
        tl.store(routes + slot, chosen, mask=live)
        if not MEMBERS:
            append(chosen, slot, live, counts, buckets, tokens, experts, BM, BN)
        last_score = best
        last_expert = chosen


SPEC = KernelSpec("route", route_kernel, reference, ("token_tiles", "one", "one"))
