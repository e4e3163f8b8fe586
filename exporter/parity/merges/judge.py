"""Whether a runtime matched tokens rightly: its choices against float64 cosines of the tokens that it got itself.

Another best one than float64's is a near tie if the cosines differ by less than float32 can be off, and an error otherwise; so is
another set of merged patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exporter.forms.form import half_ulps
from moee.tokens.merge import Choice, TokenMerge


@dataclass(frozen=True)
class Matched:
    """What one merge read, patches [B, P, D], and chose."""

    patches: Tensor
    choice: Choice


@dataclass(frozen=True)
class MergeParity:
    """The merge of one block on `matched` patches of the first set. `wrong` of them have another best one, or merge where others
    should, by up to `margin` of cosine more than rounding explains."""

    name: str
    matched: int
    wrong: int
    margin: float

    @property
    def passed(self) -> bool:
        return self.matched > 0 and self.wrong == 0

    @property
    def message(self) -> str:
        if not self.matched:
            return "no token was matched"
        return f"{self.wrong} of {self.matched} tokens merge otherwise than they should, by up to {self.margin:.2e} of cosine"

    def also(self, other: MergeParity) -> MergeParity:
        """The same merge on more images."""
        return MergeParity(self.name, self.matched + other.matched, self.wrong + other.wrong, max(self.margin, other.margin))


def judge_merge(name: str, merge: TokenMerge, found: Matched) -> MergeParity:
    """Hold a runtime's matching against `merge`, whose weights are the graph's in float64."""
    cosines, bound = _cosines(merge, found.patches)
    order, best = found.choice
    count, seconds = cosines.shape[1:]
    whole = torch.arange(count).expand_as(order)
    if order.shape != best.shape or best.shape != cosines.shape[:2] or not torch.equal(order.sort(1).values, whole):
        return MergeParity(name, best.numel(), best.numel(), float("inf"))
    inside = (best >= 0) & (best < seconds)
    taken = best.clamp(0, seconds - 1)[..., None]
    most = cosines.max(2)
    first, second = bound[:, ::2], bound[:, 1::2]
    slack = 2 * first + second.gather(1, taken[..., 0]) + second.gather(1, most.indices)
    over = most.values - cosines.gather(2, taken)[..., 0] - slack
    rank = order.argsort(1)
    merged = rank < merge.merged
    if 0 < merge.merged < count:  # none that stays may be more alike than one that merges
        likeness, off = most.values, first + second.gather(1, most.indices)
        stays = (likeness - off).masked_fill(merged, float("-inf")).max(1, keepdim=True).values
        over = torch.maximum(over, torch.where(merged, stays - likeness - off, torch.full_like(over, -1.0)))
    over = torch.where(inside & ~over.isnan(), over.clamp(min=0), torch.full_like(over, float("inf")))
    return MergeParity(name, over.numel(), int((over > 0).sum()), float(over.max()) if over.numel() else 0.0)


def _cosines(merge: TokenMerge, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines [B, A, C] in float64, and how far float32 may be off for each patch [B, P]: the larger of two patches' directions
    together."""
    x, weight, bias = patches.double(), merge.weight.double(), merge.bias.double()
    keys = nn.functional.linear(x, weight, bias)
    error = half_ulps(x.shape[-1]) * (x.abs() @ weight.abs().T + bias.abs())
    bound = 2 * error.norm(dim=-1) / keys.norm(dim=-1).clamp(min=1e-30) + half_ulps(keys.shape[-1])
    keys = nn.functional.normalize(keys, dim=-1)
    return keys[:, ::2] @ keys[:, 1::2].transpose(1, 2), bound
