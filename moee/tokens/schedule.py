"""How many tokens each block merges so that a model costs a share of its MACs, counted without running it.

All blocks merge as many tokens, or one more in the last ones: what ToMe calls a constant schedule, at the finest steps that whole
numbers allow. Where late blocks have no patches left for that, each merges a fixed share fewer than the one before it, the share
as small as possible. A block whose number would be more than half of its patches merges half.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from moee.errors import OutOfReach, UserError
from moee.interface.watch import shapes_given
from moee.mlps.attention import mean_key_map, pair_macs
from moee.models.model import Shape
from moee.tokens.block import plain_blocks
from moee.tokens.merge import TokenMerge

RATIOS = tuple(1 - step / 20 for step in range(20))  # of the tokens that the last block merges to those of the first
ROUNDING = 1e-9  # of a sum of powers; a whole number may come out so much less


@dataclass(frozen=True)
class BlockCost:
    """MACs of a block: a token's in the linear maps of `attention` and `mlp`, and `per_pair` of tokens in the attention's two
    products. `dim` is the width of a token, `keys` that of the mean key which merging compares."""

    attention: int
    mlp: int
    per_pair: int
    dim: int
    keys: int

    def macs(self, tokens: int, merged: int, prefix: int, matches: bool) -> int:
        """MACs of an image of which `tokens` come and `merged` merge; `matches`: the block looks for alike tokens."""
        cost = tokens * (self.attention + tokens * self.per_pair) + (tokens - merged) * self.mlp
        return cost + (merge_macs(tokens - prefix, merged, self.dim, self.keys) if matches else 0)


def merge_macs(patches: int, merged: int, dim: int, keys: int) -> int:
    """MACs of one merge: keys of all patches, their products, and the mean."""
    seconds = patches // 2
    return patches * dim * keys + (patches - seconds) * seconds * keys + seconds * merged * dim


def most_merged(patches: int) -> int:
    """How many of so many patches one block can merge: each into one of the second set."""
    return patches // 2


@dataclass(frozen=True)
class Costs:
    """The blocks of a model on images of `tokens` tokens, `prefix` of them no patches."""

    blocks: tuple[BlockCost, ...]
    tokens: int
    prefix: int

    def macs(self, merged: Sequence[int]) -> int:
        """MACs an image of all blocks with so many tokens merged in each."""
        total, tokens = 0, self.tokens
        for block, count in zip(self.blocks, merged, strict=True):
            total += block.macs(tokens, count, self.prefix, count > 0)
            tokens -= count
        return total

    def capped(self, merged: Sequence[int]) -> list[int]:
        """As many tokens merged in each block, or half of the patches that are left there."""
        patches, possible = self.tokens - self.prefix, []
        for count in merged:
            possible.append(min(count, most_merged(patches)))
            patches -= possible[-1]
        return possible

    def overfull(self, merged: Sequence[int]) -> tuple[int, int] | None:
        """The first block that cannot merge so many tokens, and the patches that come to it; None if all can."""
        patches = self.tokens - self.prefix
        for at, count in enumerate(merged):
            if not 0 <= count <= most_merged(patches):
                return at, patches
            patches -= count
        return None


def block_costs(model: nn.Module, shape: Shape) -> Costs:
    """The costs of a model that merges no tokens, on images of `shape`. Raises `UserError` as `plain_blocks`."""
    blocks = plain_blocks(model)
    given = shapes_given(model, ["blocks.0"], shape)["blocks.0"]
    return Costs(tuple(_cost(block) for block in blocks), given[1], int(model.num_prefix_tokens))  # type: ignore[arg-type]


def _cost(block: nn.Module) -> BlockCost:
    attention, mlp = (_linear_macs(part) for part in (block.attn, block.mlp))  # type: ignore[arg-type]
    keys, dim = mean_key_map(block.attn)[0].shape  # type: ignore[arg-type]
    return BlockCost(attention, mlp, pair_macs(block.attn), dim, keys)  # type: ignore[arg-type]


def _linear_macs(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def spread(blocks: int, total: int, ratio: float = 1.0) -> list[int]:
    """`total` merged tokens over so many blocks, a geometric series whose last is `ratio` times its first: the whole numbers
    below, and one more where most is left over, of equal remainders in the last ones. With a ratio of 1 a constant schedule."""
    weights = [ratio ** (at / max(1, blocks - 1)) for at in range(blocks)]
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(each + ROUNDING) for each in exact]
    order = sorted(range(blocks), key=lambda at: (round(counts[at] - exact[at], 9), -at))
    for at in order[: total - sum(counts)]:
        counts[at] += 1
    return counts


def schedule_of(costs: Costs, whole: int, share: float) -> list[int]:
    """The schedule that merges fewest tokens for at most the share `share` of the `whole` MACs an image that the model costs
    without: of the `RATIOS` the first with which no block but the last merges half of its patches for want of more, else the last
    that serves. Raises `OutOfReach` that names the least share if none does."""
    plain = costs.macs([0] * len(costs.blocks))
    budget, found = plain - (1 - share) * whole, list[int]()
    for ratio in RATIOS:
        wanted = next((each for each in _series(costs, ratio) if costs.macs(costs.capped(each)) <= budget), None)
        if wanted is None:  # a smaller ratio reaches no further
            break
        found = costs.capped(wanted)
        if found[:-1] == wanted[:-1]:
            break
    if found:
        return found
    least = min(costs.macs(costs.capped(wanted)) for wanted in _series(costs, 1.0))
    reach = math.ceil((whole - plain + least) / whole * 1000) / 1000
    if reach >= 1:
        patches = costs.tokens - costs.prefix
        raise OutOfReach(f"merging tokens saves none of the MACs of a model with {patches} patches; merge none")
    raise OutOfReach(f"token merging alone leaves {reach:g} of the MACs at least, {share:g} was asked for; give more")


def _series(costs: Costs, ratio: float) -> Iterator[list[int]]:
    """Schedules of this ratio, of more and more tokens, as if every block had enough."""
    blocks = len(costs.blocks)
    return (spread(blocks, total, ratio) for total in range(blocks * (most_merged(costs.tokens - costs.prefix) + 1)))


def schedule_with(costs: Costs, each: int) -> list[int]:
    """`each` merged tokens a block. Raises `UserError` for a block that does not have as many to merge."""
    merged = [each] * len(costs.blocks)
    over = costs.overfull(merged)
    if over is not None:
        at, patches = over
        most = max(m for m in range(each) if costs.overfull([m] * len(costs.blocks)) is None)
        cure = f"give {most} or fewer" if most > 1 else "give 1" if most else "not every block can merge one, leave it out"
        raise UserError(
            f"--merge-tokens {each}: `blocks.{at}` has {patches} patches left, of which {most_merged(patches)} can merge; {cure}"
        )
    return merged


def merges_cost(merges: dict[str, TokenMerge]) -> int:
    """Numbers that the merges of a model store."""
    return sum(merge.weight.numel() + merge.bias.numel() for merge in merges.values())
