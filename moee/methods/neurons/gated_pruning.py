"""Static pruning of a gated MLP: from the neurons that stay to the layer that has no others.

The neurons are chosen by `moee.methods.convert.choose_neurons` and the down map is refitted by `moee.calibrate.refit`, as for
every other MLP: both see the hidden activations act(gate) * up, one number a neuron.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moee.calibrate.grouping import GroupedLayer, stays_dense
from moee.layers.report import LayerReport
from moee.mlps.gated import GatedFFN, GatedMLP, GatedWeights
from moee.models.ffn import FFN


def prune_gated(
    grouped: GroupedLayer, kept: list[Tensor] | None, compensation: str
) -> tuple[GatedFFN | None, LayerReport]:
    """A gated MLP with the neurons `kept[0]` alone; None and the reason where it stays dense."""
    ffn = grouped.ffn
    assert isinstance(ffn, GatedMLP), f"{ffn.name} is {type(ffn).__name__}"
    if kept is None:
        return None, stays_dense(ffn, "dense: the pruned layer would cost as much", grouped.noise)
    layer = narrower(ffn, kept[0], grouped.moments.mean[0] if compensation != "none" else None)
    report = LayerReport(
        ffn.name, "routed", ffn.hidden, 1, layer.union, layer.widths, grouped.share.tolist(), grouped.noise,
        int(grouped.moments.count.sum()),
    )  # fmt: skip
    return layer, report


def narrower(ffn: GatedMLP, kept: Tensor, mean: Tensor | None = None) -> GatedFFN:
    """`ffn` with the neurons `kept` [U] int64. `mean` [H] of the hidden activations takes the dropped ones' place in the output
    bias; without it they are left out."""
    b_out = ffn.b_down.double()
    if mean is not None:
        dropped = mean.double().clone()
        dropped[kept] = 0
        b_out = b_out + ffn.w_down.double() @ dropped
    weights = GatedWeights(
        ffn.w_gate[kept], ffn.b_gate[kept], ffn.w_up[kept], ffn.b_up[kept], ffn.w_down.T[kept], b_out.float()[None]
    )
    return GatedFFN(weights, ffn.activation, ffn.channels_first)


def whole(ffn: FFN) -> GatedFFN:
    """The gated MLP `ffn` with every neuron."""
    assert isinstance(ffn, GatedMLP), f"{ffn.name} is {type(ffn).__name__}"
    return narrower(ffn, torch.arange(ffn.hidden))
