"""What a refit needs to know of a layer's tokens: sums over parts of them, by expert, and the means taken off at the end.

The sums are of values less a shift that lies near their mean, one for each expert and the same for all parts: one pass over the
tokens, and nothing is lost to rounding when the mean is taken off the sum over all parts. So parts can be summed by anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moee.calibrate.calibration import CHUNK, TokenSite, as_tokens
from moee.calibrate.in_step import WaitingStep
from moee.calibrate.ridge import add_upper, mirrored
from moee.layers.ops import expert_rows
from moee.layers.routed import NeuronLayer
from moee.parallel.group import Group, Parcel
from moee.tokens.prefix import token_weights

SAMPLE = 16  # one in so many tokens of an expert is seen for its shift

Shifts = dict[int, tuple[Tensor, Tensor]]
"""By expert: of its activations [H], and of its targets [D]."""


class Original(TokenSite, Protocol):
    """What a refitted layer stands for: a dense MLP (`moee.models.ffn.FFN`), or a mixture of more experts."""

    @property
    def b_down(self) -> Tensor:
        """Bias [D] of its output."""

    @property
    def scale(self) -> Tensor | None:
        """The LayerScale [D] behind it, if there is one and it is known."""

    def target(self, tokens: Tensor) -> Tensor:
        """Outputs [n, D] less the bias, for input tokens [n, D]."""

    def to(self, device: torch.device) -> Original:
        """The same with its tensors on `device`."""


@dataclass(frozen=True)
class LayerPart:
    """Input tokens [N, D] of some images, what each counts for [N] (None: all alike), and what the layer is to give of it less
    the dense bias [N, D] (None: the original's output)."""

    tokens: Tensor
    weights: Tensor | None = None
    targets: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """The weights [N]; ones where all count alike."""
        return torch.ones(len(self.tokens), device=self.tokens.device) if self.weights is None else self.weights

    def target(self, ffn: Original, rows: Tensor) -> Tensor:
        """What the layer is to give for the tokens `rows` [n], less the dense bias [n, D]."""
        return ffn.target(self.tokens[rows]) if self.targets is None else self.targets[rows]

    def rows(self, layer: NeuronLayer) -> list[tuple[int, Tensor, Tensor]]:
        """Experts that some token takes: number, rows, and the stored neurons that it keeps."""
        routes = layer.routes(self.tokens.movedim(-1, 1) if layer.channels_first else self.tokens)[:, :1]
        return list(expert_rows(routes, layer.neurons, layer.offsets))


class RefitStep(WaitingStep):
    """Stands where a routed layer will be: passes wait here until it is refitted on what they bring."""

    def __init__(self, layer: NeuronLayer, ffn: Original, prefix: Callable[[int], int]):
        super().__init__()
        self.layer, self.ffn, self.prefix = layer, ffn, prefix

    def part(self, x: Tensor) -> LayerPart:
        """What a pass brings, as tokens."""
        weights = None
        if x.ndim == 3 and (prefix := self.prefix(x.shape[1])):
            weights = token_weights(x.shape[1], prefix).to(x.device).repeat(len(x))
        return LayerPart(as_tokens(x, self.layer.channels_first).float(), weights)

    def apply_to(self, x: Tensor) -> Tensor:
        parts = [self.layer(part) for part in x.split(max(1, CHUNK * len(x) // max(1, x.numel() // self.ffn.dim)))]
        return torch.cat(parts)


def find_shifts(
    layer: NeuronLayer, ffn: Original, parts: Sequence[LayerPart], group: Group
) -> tuple[Shifts, list[int]]:
    """The shifts of all experts that have tokens, on every rank, each by some tokens of the first part that has any; and how many
    tokens each rank has."""
    with group.agreed():
        own: dict[int, tuple[LayerPart, Tensor, Tensor]] = {}
        for part in parts:
            for e, rows, kept in part.rows(layer):
                own.setdefault(e, (part, rows[::SAMPLE], kept))
    told = group.all_json({"tokens": sum(len(part.tokens) for part in parts), "experts": sorted(own)})
    shifts: Shifts = {}
    for rank, facts in enumerate(told):
        first = [e for e in facts["experts"] if e not in shifts]
        if first:
            with group.agreed():
                mine = {e: _shift_of(layer, ffn, *own[e]) for e in first} if rank == group.rank else {}
            shifts |= _shared_shifts(mine, first, rank, group, layer.w_down.device)
    return shifts, [facts["tokens"] for facts in told]


def _shift_of(layer: NeuronLayer, ffn: Original, part: LayerPart, rows: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """An expert's shift, by some of its tokens, the `rows` [n] of a part."""
    return layer.activations(part.tokens[rows], kept).mean(0), part.target(ffn, rows).mean(0)


def _shared_shifts(mine: Shifts, experts: list[int], source: int, group: Group, device: torch.device) -> Shifts:
    """The shifts of these experts, which rank `source` has."""
    if group.alone:
        return mine
    tensors = {f"{e} {which}": value for e, pair in mine.items() for which, value in enumerate(pair)}
    tensors = dict(group.broadcast(Parcel(None, tensors), source).tensors)
    return {e: (tensors[f"{e} 0"].to(device), tensors[f"{e} 1"].to(device)) for e in experts}


def scale_of(ffn: Original) -> Tensor:
    """What an error of the MLP's output is multiplied by in its block [D]."""
    return torch.ones(ffn.dim, device=ffn.b_down.device) if ffn.scale is None else ffn.scale.float()


def part_sums(layer: NeuronLayer, ffn: Original, part: LayerPart, held_out: Tensor | None, shifts: Shifts) -> dict[str, Tensor]:
    """Of activations H [N, U] (zero where a token's expert has no such neuron) and targets T [N, D] less their shifts, and what
    is missed, R = T - H W: the Gram matrix H'H, the cross product H'R, sums over the tokens by expert, and squares behind the
    LayerScale; every token times what it counts for. The first dimension of each tells the tokens that are not held out from
    those that are, if any."""
    device, halves = part.tokens.device, 1 if held_out is None else 2
    scale = scale_of(ffn)
    experts, dim = layer.b_out.shape
    exact = torch.zeros(0, dtype=torch.float64, device=device)
    sums = {
        "gram": torch.zeros(halves, layer.union, layer.union, device=device),
        "cross": torch.zeros(halves, layer.union, dim, device=device),
        "hidden": exact.new_zeros(halves, len(layer.neurons)), "target": exact.new_zeros(halves, experts, dim),
        "count": exact.new_zeros(halves, experts), "missed": exact.new_zeros(halves), "power": exact.new_zeros(halves),
    }  # fmt: skip
    counts = part.counts
    bounds = layer.offsets.tolist()
    for e, rows, kept in part.rows(layer):
        hidden_shift, target_shift = shifts[e]
        weight, place = layer.w_down[kept], _places(kept, layer.union)
        for which in range(halves):
            chosen = rows if held_out is None else rows[held_out[rows] == bool(which)]
            if not len(chosen):
                continue
            gram = torch.zeros(len(kept), len(kept), device=device)
            cross = torch.zeros(len(kept), dim, device=device)
            own = sums["hidden"][which, bounds[e] : bounds[e + 1]]
            for few in chosen.split(CHUNK):
                x, each = part.tokens[few], counts[few][:, None]
                hidden, target = layer.activations(x, kept) - hidden_shift, part.target(ffn, few) - target_shift
                rest, weighed = target - hidden @ weight, hidden * each
                add_upper(gram, hidden, weighed)
                cross.addmm_(weighed.T, rest)
                own += weighed.sum(0, dtype=torch.float64)
                sums["target"][which, e] += (target * each).sum(0, dtype=torch.float64)
                sums["count"][which, e] += each.sum(dtype=torch.float64)
                sums["missed"][which] += ((rest * scale).square() * each).sum(dtype=torch.float64)
                sums["power"][which] += ((target * scale).square() * each).sum(dtype=torch.float64)
            sums["gram"][which].view(-1).scatter_add_(0, place, mirrored(gram).flatten())
            sums["cross"][which].index_add_(0, kept, cross)
    return sums


def _places(kept: Tensor, union: int) -> Tensor:
    """Where the Gram matrix of the neurons `kept` lies in that of all `union` of them, flat."""
    return (kept[:, None] * union + kept).flatten()


@dataclass(frozen=True)
class CentredSums:
    """Sums of values less their expert's mean, one for the tokens that are not held out, and one for those that are, if any.

    `means`: by expert its neurons, and the means of its activations and of its targets. `moment`: the squares of the
    activations' means, times the tokens.
    """

    gram: Tensor
    cross: Tensor
    missed: list[float]
    power: list[float]
    means: dict[int, tuple[Tensor, Tensor, Tensor]]
    moment: float


def centred(layer: NeuronLayer, ffn: Original, sums: Mapping[str, Tensor], shifts: Shifts) -> CentredSums:
    """The sum over all parts with each expert's mean taken off; `sums` is used up."""
    gram, cross, missed, power = (sums[name] for name in ("gram", "cross", "missed", "power"))
    means: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    moment, scale = 0.0, scale_of(ffn).double()
    for e, (hidden_sum, target_sum, count), kept in _by_expert(layer, sums):
        total = count.sum()
        hidden, target = hidden_sum.sum(0) / total, target_sum.sum(0) / total  # how far the shift lies from the mean
        means[e] = kept, (shifts[e][0].double() + hidden).float(), (shifts[e][1].double() + target).float()
        moment += float(total * means[e][1].double().square().sum())
        weight, place = layer.w_down[kept].double(), _places(kept, layer.union)
        rest = target - hidden @ weight
        for which in range(len(gram)):
            h, t, n = hidden_sum[which], target_sum[which], count[which]
            rest_sum, off = t - h @ weight, h - n * hidden
            gram[which].view(-1).scatter_add_(0, place, -_outer(off, hidden, hidden, h).flatten())
            cross[which].index_add_(0, kept, _outer(off, rest, hidden, rest_sum), alpha=-1)
            missed[which] += (scale.square() * (n * rest.square() - 2 * rest * rest_sum)).sum()
            power[which] += (scale.square() * (n * target.square() - 2 * target * t)).sum()
    return CentredSums(gram, cross, missed.tolist(), power.tolist(), means, moment)


def _by_expert(
    layer: NeuronLayer, sums: Mapping[str, Tensor]
) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor], Tensor]]:
    """Experts with tokens: sums of activations [halves, H], of targets [halves, D], tokens [halves]; neurons [H]."""
    bounds = layer.offsets.tolist()
    for e in sums["count"].sum(0).nonzero().flatten().tolist():
        own = slice(bounds[e], bounds[e + 1])
        yield e, (sums["hidden"][:, own], sums["target"][:, e], sums["count"][:, e]), layer.neurons[own].long()


def _outer(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """a b' + c d' in float32."""
    return (torch.outer(a, b) + torch.outer(c, d)).float()
