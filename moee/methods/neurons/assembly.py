"""From a grouped layer and the neurons that its experts keep to the tensors of a routed FFN."""

from __future__ import annotations

import torch
from torch import Tensor

from moee.calibrate.grouping import GroupedLayer, stays_dense
from moee.layers.report import LayerReport
from moee.layers.routed import LOAD_UNIT, Experts, NeuronLayer, RoutedFFN
from moee.methods.neurons.gated_pruning import narrower
from moee.mlps.gated import GatedMLP
from moee.models.ffn import FFN


def build_layer(
    routed: GroupedLayer, kept: list[Tensor] | None, compensation: str
) -> tuple[RoutedFFN | None, LayerReport]:
    """The layer whose experts keep the given neurons, ascending ids an expert; None and the reason where it stays dense."""
    ffn = routed.ffn
    if kept is None:
        return None, stays_dense(ffn, "dense: experts would cost as much", routed.noise)
    experts = assemble(ffn, routed.moments.mean, routed.router, routed.bias, kept, compensation=compensation, share=routed.share)
    widths = experts.widths
    return RoutedFFN(experts, ffn.channels_first), LayerReport(
        ffn.name, "routed", ffn.hidden, len(widths), len(experts.w_up), widths, routed.share.tolist(), routed.noise,
        int(routed.moments.count.sum()),
    )  # fmt: skip


def assemble(
    ffn: FFN, mean: Tensor, router: Tensor, router_bias: Tensor, kept: list[Tensor], *, compensation: str, share: Tensor
) -> Experts:
    """Gather the union of the neurons that the experts keep into one store and compute the output biases. `mean` [K, H]: of
    each expert's activations.

    With compensation, b_out[e] = b + sum over dropped j of E[a_j | e] * W2[:, j] (design rule: dropped neurons are
    replaced by their mean); without, b_out[e] = b.
    """
    union = torch.cat(kept).unique()
    position = torch.full((ffn.hidden,), -1, dtype=torch.int64)
    position[union] = torch.arange(len(union))
    biases = []
    for e, neurons in enumerate(kept):
        dropped = mean[e].to(torch.float64, copy=True)
        dropped[neurons] = 0
        extra = ffn.w_down.double() @ dropped if compensation != "none" else 0
        biases.append((ffn.b_down.double() + extra).float())
    offsets = torch.tensor([0, *[len(n) for n in kept]]).cumsum(0)
    return Experts(
        router=router,
        router_bias=router_bias,
        w_up=ffn.w_up[union],
        b_up=ffn.b_up[union],
        w_down=ffn.w_down.T[union],
        b_out=torch.stack(biases),
        neurons=torch.cat([position[n] for n in kept]).to(torch.int32),
        offsets=offsets.to(torch.int32),
        activation=ffn.activation,
        load=tuple((share * LOAD_UNIT).round().long().tolist()),
    )


def chosen_anew(layer: NeuronLayer, ffn: FFN, kept: list[Tensor], mean: Tensor) -> NeuronLayer:
    """`layer` with other neurons of its dense original `ffn`: those that each expert keeps, dense numbers ascending, and the
    means [K, H] of its activations in place of the others."""
    if not isinstance(layer, RoutedFFN):
        assert isinstance(ffn, GatedMLP), f"{ffn.name} is {type(ffn).__name__}"
        return narrower(ffn, kept[0], mean[0])
    share = torch.tensor(layer.load, dtype=torch.float64) / LOAD_UNIT
    router, bias = layer.router.detach(), layer.router_bias
    return RoutedFFN(assemble(ffn, mean, router, bias, kept, compensation="mean", share=share), ffn.channels_first)
