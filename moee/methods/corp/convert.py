"""CORP from a dense model and calibration images: one forward pass, then each layer by itself, in closed form.

An MLP keeps the neurons of the most energy E a^2. What goes is an affine function of what stays, by ridge regression, which its
down map takes up: the refit of `moee.calibrate.refit` on the dense model's own tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moee.calibrate.calibration import LayerTokens
from moee.calibrate.grouping import one_group
from moee.calibrate.refit import refit_layer
from moee.data.transform import model_transform
from moee.data.validation import fitted_part
from moee.errors import UserError
from moee.interface.watch import watched
from moee.kinds.attention_records import AttentionRecord, attention_records, rebuild_attention
from moee.layers.report import LayerReport
from moee.layers.routed import NeuronLayer
from moee.methods.context import Context
from moee.methods.convert import calibrate
from moee.methods.corp.attention import compensated
from moee.methods.corp.budget import Costs, dimensions_at, neurons_at
from moee.methods.corp.options import CorpOptions
from moee.methods.exchange import share_layers
from moee.methods.heads.fit import HeadMoments, narrowed
from moee.methods.neurons.assembly import build_layer
from moee.methods.neurons.gated_pruning import prune_gated
from moee.mlps.attention import Widths
from moee.mlps.find import find_ffns, reports_of
from moee.mlps.sites import put_mlp
from moee.models.ffn import FFN
from moee.models.model import replace_module
from moee.parallel.devices import computing_on, placed
from moee.parallel.group import Group, Parcel
from moee.store.scratch import temporary_folder
from moee.tokens.prefix import prefix_tokens


@torch.no_grad()
def convert(model: nn.Module, options: CorpOptions, context: Context) -> list[LayerReport]:
    """Cut the MLPs and heads of `model` in place, on the images of the context; a report an MLP. Raises `UserError` for input
    that it cannot work with; the model is then unchanged."""
    alone = replace(context, group=Group(device=context.group.device), data=fitted_part(context.data), sampled=None)
    device, shape = alone.group.device, model_transform(model).shape
    costs = Costs.of(model, options, shape)
    keep = options.keep if options.target_macs is None else costs.keep_for(options.target_macs)
    mlps = find_ffns(model, options.exclude, gated=True)
    model.eval()
    with temporary_folder(context.scratch) as folder, placed(model, device), computing_on(device):
        moments = {name: HeadMoments(attention, prefix_tokens(model)) for name, attention in costs.attentions.items()}
        with watched(model, moments, lambda name, x: moments[name].add(x)):
            sampled = calibrate(model, mlps.ffns, Path(folder), options, alone)
        _require_finite(moments)
        made: list[tuple[NeuronLayer, LayerReport]] = []
        for ffn, tokens in zip(mlps.ffns, sampled, strict=True):
            made.append(_pruned(ffn, tokens, keep, options, device))
            context.report("corp", len(made), len(mlps.ffns))
        narrow = {
            name: narrowed(each.attention, compensated(each, widths.qk), widths, each)
            for name, each in moments.items()
            if (widths := Widths(dimensions_at(keep, each.attention.head_dim), each.attention.head_dim)).qk < widths.v
        }
    for name, attention in narrow.items():
        replace_module(model, name, attention.cpu())
    for ffn, (layer, _) in zip(mlps.ffns, made, strict=True):
        put_mlp(model, ffn.name, layer, ffn.bypassed)
    return [*(report for _, report in made), *reports_of(mlps)]


def _pruned(
    ffn: FFN, tokens: LayerTokens, keep: float, options: CorpOptions, device: torch.device
) -> tuple[NeuronLayer, LayerReport]:
    """An MLP with its neurons of the most energy, refitted on its tokens."""
    grouped = one_group(ffn, tokens, options, device)
    energy = grouped.moments.mean[0].square() + grouped.moments.variance[0]
    kept = energy.sort(descending=True, stable=True).indices[: neurons_at(keep, ffn.hidden)].sort().values.cpu()
    layer, report = (prune_gated if ffn.gated else build_layer)(grouped, [kept], "mean")
    assert layer is not None, "it was told what to keep"
    refit = refit_layer(layer.to(device), ffn.to(device), tokens.load().to(device))
    return layer.cpu(), replace(report, refit=refit)


def _require_finite(moments: Mapping[str, HeadMoments]) -> None:
    for name, each in moments.items():
        if not all(torch.isfinite(t).all() for t in (each.query, each.key, each.read)):
            raise UserError(
                f"`{name}` receives NaN or infinite activations on the calibration data; check the weights and the input "
                "normalisation"
            )


def share(model: nn.Module, group: Group) -> None:
    """Give every rank the layers that rank 0 has put into its `model`."""
    if group.alone:
        return
    records: list[dict[str, Any]] = attention_records(model) if group.leader else []
    names = tuple(f"{record['name']}." for record in records)
    own: dict[str, Tensor] = {key: value for key, value in model.state_dict().items() if names and key.startswith(names)}
    parcel = group.broadcast(Parcel(records, own) if group.leader else None)
    if not group.leader:
        found: Sequence[AttentionRecord] = [AttentionRecord(**record) for record in parcel.body]
        rebuild_attention(model, list(found), dict(parcel.tensors), Path("what rank 0 sent"))
    share_layers(model, group)
