"""Which widths the heads of each attention get, by what narrowing one at a time was measured to lose."""

from __future__ import annotations

import math
from dataclasses import replace

from timm.layers import Attention
from torch import nn

from moee.errors import UserError
from moee.mlps.attention import Widths, attention_macs, find_attentions, input_shapes
from moee.models.model import Shape

STEP = 8  # dimensions: what tensor cores and fused attention want multiples of
LEAST = 0.5  # share of a head's dimensions that stays, at least


def full_widths(attention: Attention) -> Widths:
    """All dimensions of its heads."""
    return Widths(attention.head_dim, attention.head_dim)


def levels(head_dim: int) -> list[int]:
    """Dimensions to try, from all of them down to LEAST, in multiples of STEP."""
    first = (head_dim - 1) // STEP * STEP
    return [head_dim, *range(first, max(STEP, -(-int(LEAST * head_dim) // STEP) * STEP) - 1, -STEP)]


def moves(head_dim: int, equal: bool) -> list[Widths]:
    """The widths whose loss is measured: query and key alone, values alone; or both as one, where they are to be equal."""
    narrower = levels(head_dim)[1:]
    if equal:
        return [Widths(width, width) for width in narrower]
    return [Widths(width, head_dim) for width in narrower] + [Widths(head_dim, width) for width in narrower]


def check_share(model: nn.Module, shape: Shape, share: float) -> None:
    """Raise `UserError` if the attentions of `model`, on images of `shape`, cannot be narrowed to `share` of their MACs."""
    attentions = find_attentions(model)
    check_reach(attentions, input_shapes(model, attentions, shape), share)


def narrowest_and_full(model: nn.Module, shape: Shape) -> list[tuple[int, int]]:
    """MACs an image of every attention of `model`, on images of `shape`: as narrow as it can be, and as it is."""
    attentions = find_attentions(model)
    shapes = input_shapes(model, attentions, shape)
    return [
        (macs_of(a, Widths(levels(a.head_dim)[-1], levels(a.head_dim)[-1]), shapes[n]), macs_of(a, full_widths(a), shapes[n]))
        for n, a in attentions.items()
    ]


def check_reach(attentions: dict[str, Attention], shapes: dict[str, tuple[int, int]], share: float) -> None:
    """Raise `UserError` for a share of the MACs that the narrowest heads exceed."""
    narrowest = {name: levels(attention.head_dim)[-1] for name, attention in attentions.items()}
    low = sum(macs_of(a, Widths(narrowest[n], narrowest[n]), shapes[n]) for n, a in attentions.items())
    least = low / sum(macs_of(a, full_widths(a), shapes[n]) for n, a in attentions.items())
    if share < least * (1 - 1e-9):
        raise UserError(
            f"--attention-macs {share:g}: heads keep at least half of their dimensions, in multiples of {STEP}, so give "
            f"{math.ceil(least * 100) / 100:.2f} or more"
        )


def macs_of(attention: Attention, widths: Widths, shape: tuple[int, int]) -> int:
    """MACs an image with heads of these widths, for inputs of `shape` (windows of an image, tokens of each)."""
    return attention_macs(attention.qkv.in_features, attention.num_heads, widths, *shape)


def choose_widths(
    attentions: dict[str, Attention], shapes: dict[str, tuple[int, int]], losses: dict[tuple[str, Widths], float],
    share: float, equal: bool,
) -> dict[str, Widths]:  # fmt: skip
    """Widths whose MACs are at most `share` of all: the cheapest loss a MAC first, over one or several steps."""
    current = {name: full_widths(attention) for name, attention in attentions.items()}
    dense = sum(macs_of(a, current[name], shapes[name]) for name, a in attentions.items())
    total = dense

    def loss(name: str, widths: Widths) -> float:
        """Losses of query with key and of values are taken to add up."""
        full = attentions[name].head_dim
        if equal:
            return losses.get((name, widths), 0.0)
        return losses.get((name, Widths(widths.qk, full)), 0.0) + losses.get((name, Widths(full, widths.v)), 0.0)

    while total > share * dense * (1 + 1e-9):
        best: tuple[float, str, Widths] | None = None
        for name, attention in attentions.items():
            now = current[name]
            for width in levels(attention.head_dim):
                if equal:
                    options = [Widths(width, width)]
                else:
                    options = [replace(now, qk=min(width, now.qk)), replace(now, v=min(width, now.v))]
                for option in options:
                    freed = macs_of(attention, now, shapes[name]) - macs_of(attention, option, shapes[name])
                    if freed > 0:
                        price = (loss(name, option) - loss(name, now)) / freed
                        best = min(best or (price, name, option), (price, name, option), key=lambda item: item[0])
        assert best is not None, "check_reach saw that the share can be met"
        _, name, option = best
        total -= macs_of(attentions[name], current[name], shapes[name]) - macs_of(attentions[name], option, shapes[name])
        current[name] = option
    return current
