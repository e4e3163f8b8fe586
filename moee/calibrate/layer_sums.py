"""What a refit needs to know of a layer's tokens: sums over parts of them, by expert, and the means taken off at the end.

The sums are of values less a shift that lies near their mean, one for each expert and the same for all parts: one pass over the
tokens, and nothing is lost to rounding when the mean is taken off the sum over all parts. So parts can be summed by anybody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moee.calibrate.calibration import CHUNK
from moee.layers.ops import expert_rows
from moee.layers.routed import NeuronLayer

SAMPLE = 16  # one in so many tokens of an expert is seen for its shift

Shifts = dict[int, tuple[Tensor, Tensor]]
"""By expert: of its activations [H], and of the original's output [D]."""


class Original(Protocol):
    """What a refitted layer stands for: a dense MLP (`moee.models.ffn.FFN`), or a mixture of more experts."""

    @property
    def name(self) -> str:
        """Path of the module."""

    @property
    def dim(self) -> int:
        """Width of its tokens."""

    @property
    def b_down(self) -> Tensor:
        """Bias [D] of its output."""

    def target(self, tokens: Tensor) -> Tensor:
        """Outputs [n, D] less the bias, for input tokens [n, D]."""

    def to(self, device: torch.device) -> Original:
        """The same with its tensors on `device`."""


@dataclass(frozen=True)
class LayerPart:
    """Input tokens [N, D] of some images, and what each counts for [N] (None: all alike)."""

    tokens: Tensor
    weights: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """The weights [N]; ones where all count alike."""
        return torch.ones(len(self.tokens), device=self.tokens.device) if self.weights is None else self.weights

    def rows(self, layer: NeuronLayer) -> list[tuple[int, Tensor, Tensor]]:
        """Experts that some token takes: number, rows, and the stored neurons that it keeps."""
        routes = layer.routes(self.tokens.movedim(-1, 1) if layer.channels_first else self.tokens)[:, :1]
        return list(expert_rows(routes, layer.neurons, layer.offsets))


def shift_of(layer: NeuronLayer, ffn: Original, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """An expert's shift, by some of its tokens `x` [N, D]."""
    return layer.activations(x, kept).mean(0), ffn.target(x).mean(0)


def part_sums(layer: NeuronLayer, ffn: Original, part: LayerPart, held_out: Tensor | None, shifts: Shifts) -> dict[str, Tensor]:
    """Of activations H [N, U] (zero where a token's expert has no such neuron) and targets T [N, D] less their shifts, and what
    is missed, R = T - H W: the Gram matrix H'H, the cross product H'R, sums over the tokens by expert, and squares; every token
    times what it counts for. The first dimension of each tells the tokens that are not held out from those that are, if any."""
    device, halves = part.tokens.device, 1 if held_out is None else 2
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
                hidden, target = layer.activations(x, kept) - hidden_shift, ffn.target(x) - target_shift
                rest, weighed = target - hidden @ weight, hidden * each
                gram.addmm_(weighed.T, hidden)
                cross.addmm_(weighed.T, rest)
                own += weighed.sum(0, dtype=torch.float64)
                sums["target"][which, e] += (target * each).sum(0, dtype=torch.float64)
                sums["count"][which, e] += each.sum(dtype=torch.float64)
                sums["missed"][which] += (rest.square() * each).sum(dtype=torch.float64)
                sums["power"][which] += (target.square() * each).sum(dtype=torch.float64)
            sums["gram"][which].view(-1).scatter_add_(0, place, gram.flatten())
            sums["cross"][which].index_add_(0, kept, cross)
    return sums


def _places(kept: Tensor, union: int) -> Tensor:
    """Where the Gram matrix of the neurons `kept` lies in that of all `union` of them, flat."""
    return (kept[:, None] * union + kept).flatten()


@dataclass(frozen=True)
class CentredSums:
    """Sums of values less their expert's mean, one for the tokens that are not held out, and one for those that are, if any.

    `means`: by expert its neurons, and the means of its activations and of the dense output. `moment`: the squares of the
    activations' means, times the tokens.
    """

    gram: Tensor
    cross: Tensor
    missed: list[float]
    power: list[float]
    means: dict[int, tuple[Tensor, Tensor, Tensor]]
    moment: float


def centred(layer: NeuronLayer, sums: Mapping[str, Tensor], shifts: Shifts) -> CentredSums:
    """The sum over all parts with each expert's mean taken off; `sums` is used up."""
    gram, cross, missed, power = (sums[name] for name in ("gram", "cross", "missed", "power"))
    means: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    moment = 0.0
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
            missed[which] += n * rest @ rest - 2 * rest @ rest_sum
            power[which] += n * target @ target - 2 * target @ t
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
