"""The output projection of a narrowed attention, refitted to the dense model's residual stream behind it.

What a narrower head loses, and what the layers before it have lost, the projection makes good as far as what it reads tells: the
same regression as that of a down map (`moee.calibrate.refit`), with a layer's own lambda chosen on held-out tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moee.calibrate.in_step import InStep, WaitingStep
from moee.calibrate.ridge import choose_ridge, held_out_runs, solve_ridge
from moee.calibrate.stream import target_of
from moee.mlps.attention import NarrowAttention
from moee.mlps.residual import AttentionSite
from moee.parallel.group import Group, Parcel
from moee.parallel.ordered import OrderedSum
from moee.surroundings import own_arithmetic
from moee.tokens.prefix import token_weights

BATCH = 16  # images a product
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # as many numbers as a head has dimensions need less than thousands of neurons


class ProjectionStep(WaitingStep):
    """Stands where a narrowed attention is: passes wait here until its projection is refitted on what they bring."""

    def __init__(self, attention: NarrowAttention):
        super().__init__()
        self.attention = attention

    def apply_to(self, x: Tensor) -> Tensor:
        return torch.cat([self.attention(part) for part in x.split(BATCH)])


@dataclass(frozen=True)
class ProjectionPart:
    """What an attention is given of some images [B, N, D], the output that is wanted of it [B N, D], and what each token counts
    for [B N]."""

    x: Tensor
    targets: Tensor
    weights: Tensor


def project(
    step: ProjectionStep, site: AttentionSite, running: InStep, beside: InStep, *, prefix_of: Callable[[int], int], group: Group
) -> None:
    """Refit the projection of the attention at a `site`, once the passes of its model and those `beside`, of the dense one, have
    come to it. `prefix_of`: tokens that are no patches, by the number of an image's tokens."""
    scale = None if site.scale is None else site.scale.to(group.device)
    with group.agreed():
        parts = []
        for own, dense in zip(running.bring(step, site.name), beside.bring(site.name, site.name), strict=True):
            images, count = own.x.shape[:2]
            weights = token_weights(count, prefix_of(count)).to(own.x.device).repeat(images)
            parts.append(ProjectionPart(own.x, target_of(dense.x, own.beside, scale), weights))
    with own_arithmetic():
        refit_projection(step.attention, parts, scale, group)
    step.ready = True


@torch.no_grad()
def refit_projection(
    attention: NarrowAttention, parts: Sequence[ProjectionPart], scale: Tensor | None, group: Group
) -> None:
    """Correct `attention.proj` by this rank's parts of the tokens, those of lower ranks first; every rank's gets the same bytes.
    It stays as it is where no lambda of `RIDGES` lowers the error of held-out tokens. `scale` [D]: the LayerScale behind it."""
    device = attention.proj.weight.device
    told = group.all_json([len(part.targets) for part in parts])
    before, total = sum(sum(rank) for rank in told[: group.rank]), sum(sum(rank) for rank in told)
    held_out = held_out_runs(total).to(device)
    sums = OrderedSum(group)
    with group.agreed():
        for part in parts:
            sums.add(_part_sums(attention, part, held_out[before : before + len(part.targets)]))
            before += len(part.targets)
    whole = sums.total()
    with group.agreed():
        if group.leader:
            _solve(attention, {name: value.to(device) for name, value in whole.items()}, scale)
    if not group.alone:
        state = group.broadcast(Parcel(None, attention.proj.state_dict())).tensors
        attention.proj.load_state_dict(dict(state))


def _part_sums(attention: NarrowAttention, part: ProjectionPart, held_out: Tensor) -> dict[str, Tensor]:
    """Of what the projection reads R and what it misses M = T - R W - b, both float64, for the tokens that are not held out and
    those that are: R'R, R'M, sums and counts."""
    width, dim, images = attention.proj.in_features, attention.proj.out_features, len(part.x)
    exact = torch.zeros(0, dtype=torch.float64, device=part.x.device)
    sums = {
        "gram": exact.new_zeros(2, width, width), "cross": exact.new_zeros(2, width, dim), "read": exact.new_zeros(2, width),
        "missed": exact.new_zeros(2, dim), "count": exact.new_zeros(2),
    }  # fmt: skip
    pieces = (each.unflatten(0, (images, -1)).split(BATCH) for each in (part.targets, part.weights, held_out))
    for x, targets, weights, held in zip(part.x.split(BATCH), *pieces, strict=True):
        read = attention.attend(x)
        missed = targets - attention.proj(read)
        for which in range(2):
            chosen = held == bool(which)
            own, rest, each = read[chosen], missed[chosen], weights[chosen][:, None]
            sums["gram"][which] += (own * each).T @ own
            sums["cross"][which] += (own * each).T @ rest
            sums["read"][which] += (own * each).sum(0, dtype=torch.float64)
            sums["missed"][which] += (rest * each).sum(0, dtype=torch.float64)
            sums["count"][which] += each.sum(dtype=torch.float64)
    return sums


def _solve(attention: NarrowAttention, sums: dict[str, Tensor], scale: Tensor | None) -> None:
    count = sums["count"].sum()
    read, missed = sums["read"].sum(0) / count, sums["missed"].sum(0) / count
    gram, cross = sums["gram"], sums["cross"]
    for which in range(2):  # the means of all tokens are taken off
        r, m, n = sums["read"][which], sums["missed"][which], sums["count"][which]
        gram[which] += n * torch.outer(read, read) - torch.outer(r, read) - torch.outer(read, r)
        cross[which] += n * torch.outer(read, missed) - torch.outer(r, missed) - torch.outer(read, m)
    weighed = cross if scale is None else cross * scale.double()
    ridge, _ = choose_ridge(gram[0], weighed[0], gram[1], weighed[1], RIDGES)
    if ridge is not None:
        change = solve_ridge(gram.sum(0), cross.sum(0), ridge)[0]
        attention.proj.weight.data += change.T.float()
        attention.proj.bias.data += (missed - read @ change).float()
