"""What each form of a model's layers costs on this CPU: a table over tokens and widths, and what it predicts.

A layer's time lies between the measured ones of its width, on a straight line, and where tokens merge between those of all tokens
and of fewer. A model's is the dense model's, less the dense layers that it replaces, plus what replaces them, plus the merging.
`exporter.timing.form_times` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from moee.errors import OutOfReach
from moee.layers.routed import RoutedLayer, routed_layers
from moee.mlps.attention import narrow_attentions
from moee.planning.forms import LayerChoices
from moee.tokens.block import merged_tokens

FEWER = 0.5  # of a layer's tokens, at which it is timed beside all of them where tokens can merge
ALIKE = 1.15  # times of a MAC that differ by less are within the noise
LEAST = 0.1  # of the mean time of a MAC: a layer whose time hardly grows with its width was disturbed, or waits for memory
Line = Mapping[float, float]  # milliseconds by share


@dataclass(frozen=True)
class Forms:
    """Milliseconds of the forms of a layer on its tokens of a batch. `static`: with a share of the neurons (or of a head's
    dimensions); `experts`: by their number, of tokens that each take that share."""

    dense: float
    static: Line
    experts: Mapping[int, Line] = field(default_factory=dict)

    @property
    def whole(self) -> float:
        """Of all neurons: the dense layer, or the static form with everything kept, which computes the same. It is the longer of
        the two: a timing that was disturbed must not end the search, whose result is timed as a whole."""
        return max(self.dense, self.static.get(1.0, 0.0))

    def of(self, share: float, experts: int = 1) -> float:
        """Of a layer whose tokens take `share` of it, with so many `experts`; of a number between measured ones, the nearest."""
        if experts <= 1 or not self.experts:
            return between(self.static, share)
        return between(self.experts[min(self.experts, key=lambda known: (abs(known - experts), known))], share)


def between(line: Line, share: float) -> float:
    """The value at `share` on the straight lines through the measured ones, which go on beyond them; never below zero."""
    shares = sorted(line)
    at = min(max(1, int(np.searchsorted(shares, share))), len(shares) - 1)
    low, high = shares[at - 1], shares[at]
    return max(0.0, line[low] + (line[high] - line[low]) * (share - low) / (high - low))


@dataclass(frozen=True)
class FormTable:
    """The forms of every MLP and attention by name, for `batch` images; of each MLP its neurons (`hidden`) and the MACs of the
    dense one on these images; of all of them their `tokens` an image in the dense model. Where tokens can merge: the forms at
    `FEWER` of the tokens (`fewer`, of MLPs and attention), and milliseconds of a block's merge by the share of the tokens that
    reach it (`merge`)."""

    batch: int
    hidden: Mapping[str, int]
    macs: Mapping[str, float]
    mlps: Mapping[str, Forms]
    attentions: Mapping[str, Forms]
    tokens: Mapping[str, int] = field(default_factory=dict)
    fewer: Mapping[str, Forms] = field(default_factory=dict)
    merge: Line = field(default_factory=dict)

    def predict(self, model: nn.Module, dense_ms: float) -> float:
        """Milliseconds of a batch of `model`, which was cut from the one that the table is of and that takes `dense_ms`."""
        total = dense_ms
        routed, narrowed, merged = routed_layers(model), narrow_attentions(model), merged_tokens(model)
        for name, forms in self.mlps.items():
            pick: Callable[[Forms], float] = _dense
            if (layer := routed.get(name)) is not None:
                pick = _picked(_share(layer, self.hidden[name]), layer.num_experts)
            total += self._of(name, forms, pick, self._left(name, merged, 1)) - forms.dense
        for name, forms in self.attentions.items():
            pick = _dense
            if (attention := narrowed.get(name)) is not None:
                pick = _picked((attention.widths.qk + attention.widths.v) / (2 * attention.head_dim))
            total += self._of(name, forms, pick, self._left(name, merged, 0)) - forms.dense
        if self.merge:
            total += sum(between(self.merge, self._left(name, merged, 0)) for name in self.attentions if _merges(name, merged))
        return total

    def _of(self, name: str, forms: Forms, pick: Callable[[Forms], float], left: float) -> float:
        """Of a layer with `left` of its tokens, in the form that `pick` names."""
        if left == 1:
            return pick(forms)
        if name not in self.fewer:  # the time is taken to go with the tokens
            return pick(forms) * left
        return between({FEWER: pick(self.fewer[name]), 1.0: pick(forms)}, left)

    def _left(self, name: str, merged: Sequence[int], after: int) -> float:
        """The share of its tokens that a layer in block i still gets, where `merged[i]` merge in each. `after`: 1 for what lies
        behind the block's own merge."""
        if not merged:
            return 1.0
        return 1 - sum(merged[: _block(name) + after]) / self.tokens[name]

    def choices(self, share: float, experts: int) -> LayerChoices:
        """As `moee.planning.forms.LayerForms.choices`."""
        as_experts, always = [], []
        for name, forms in self.mlps.items():
            if forms.of(share) >= forms.whole:
                always.append(name)
            elif experts > 1 and forms.of(share, experts) >= forms.whole:
                as_experts.append(name)
        if len(always) == len(self.mlps):
            raise OutOfReach(f"no MLP is faster than dense here with {share:.0%} of its neurons")
        counts = {name: 1 if name in as_experts else experts for name in self.mlps if name not in always}
        return LayerChoices(one_expert=as_experts, exclude=always, mac_times=self._mac_times(share, counts))

    def _mac_times(self, share: float, experts: Mapping[str, int]) -> dict[str, float]:
        """What a MAC more takes in each MLP around `share` of its neurons, with so many experts, relative to the mean over all
        their MACs; none where all are alike within `ALIKE`."""
        low, high = share * 0.6, share * 1.4
        more = {n: max(0.0, self.mlps[n].of(high, e) - self.mlps[n].of(low, e)) for n, e in experts.items()}
        mean = sum(more.values()) / sum((high - low) * self.macs[n] for n in more)
        if mean <= 0:
            return {}
        times = {n: float(f"{max(LEAST, ms / ((high - low) * self.macs[n] * mean)):.2g}") for n, ms in more.items()}
        return times if max(times.values()) > ALIKE * min(times.values()) else {}


def _dense(forms: Forms) -> float:
    return forms.dense


def _picked(share: float, experts: int = 1) -> Callable[[Forms], float]:
    return lambda forms: forms.of(share, experts)


def _block(name: str) -> int:
    """Merging blocks are those of timm's VisionTransformer: blocks.i."""
    return int(name.split(".")[1])


def _merges(name: str, merged: Sequence[int]) -> bool:
    return bool(merged) and merged[_block(name)] > 0


def _share(layer: RoutedLayer, hidden: int) -> float:
    """The share of the `hidden` neurons that a token takes, by the load that the layer was made for."""
    widths = torch.tensor(layer.widths, dtype=torch.float64)
    load = torch.tensor(getattr(layer, "load", ()) or [1] * len(widths), dtype=torch.float64)
    return layer.top_k * float(widths @ load / load.sum()) / hidden
