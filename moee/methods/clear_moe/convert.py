"""CLEAR-MoE from a dense model and calibration images: cluster, score, choose ranks, decompose front to back.

Two passes. The first, over the dense model, finds every layer's clusters, router, scores and loss tables. The second builds the
layers on the inputs that the converted layers before them really produce. Nothing outside the selected MLPs is touched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from moee.data.image_set import ImageSet, image_shape
from moee.errors import NothingRouted, UserError
from moee.layers.report import LayerReport
from moee.methods.clear_moe.analysis import Analysis, Ranks, analyse, calibration_set
from moee.methods.clear_moe.build import Built, build_layers
from moee.methods.clear_moe.choice import choose_ranks
from moee.methods.clear_moe.decompose import (
    check_rank,
)
from moee.methods.clear_moe.options import ClearOptions
from moee.methods.clear_moe.scoring import LayerScore
from moee.mlps.find import find_ffns, reports_of
from moee.parallel.devices import CPU
from moee.progress import Reporter, silent


@dataclass(frozen=True)
class ClearLayerReport(LayerReport):
    """What happened to one MLP. `ranks` are (up, up residual, down, down residual); widths as in `ClearFFN`: those of a dense MLP
    of equal MACs."""

    ranks: Ranks | None = None
    router_accuracy: float | None = None
    scores: LayerScore | None = None


@torch.no_grad()
def convert(
    model: nn.Module, data: ImageSet, config: ClearOptions, report: Reporter = silent, device: torch.device = CPU
) -> list[ClearLayerReport]:
    """Replace MLPs of `model` in place by `ClearFFN` layers found on `data`; returns one report a layer.

    The model runs on `device`; the decompositions, in float64, are made on the CPU.
    Deterministic for one configuration, data set and thread count. Weights outside the replaced MLPs keep their bits. Raises
    `UserError` for input that it cannot work with; the model is then unchanged.
    """
    mlps = find_ffns(model, config.exclude)
    ffns = mlps.ffns
    if config.layers is not None and config.layers > len(ffns):
        raise UserError(f"--layers {config.layers} is more than the {len(ffns)} MLPs of this model; give at most {len(ffns)}")
    if config.rank is not None:
        for ffn in ffns:
            check_rank(ffn, config.rank, config.residual_rank or 0)
    chosen = calibration_set(data, config.calibration_images, config.seed)
    if len(chosen) < config.experts:
        raise UserError(f"{len(chosen)} calibration images are fewer than the {config.experts} experts; give more images")
    found = analyse(model, ffns, chosen, config, report, device=device)
    choose_ranks(model, found, image_shape(chosen.images), config)
    selected = [a for a in found if a.ranks is not None]
    if not selected:
        raise NothingRouted("no layer gets cheaper at these ranks, so the model would stay dense; lower --rank or --energy")
    layers = build_layers(model, selected, chosen.images, config, report, device=device)
    dense = [ClearLayerReport(**vars(report)) for report in reports_of(mlps)]
    return [*(_report(a, layers.get(a.ffn.name)) for a in found), *dense]


def _report(a: Analysis, built: Built | None) -> ClearLayerReport:
    """The report of a converted layer, or of one that stayed dense."""
    dense = ClearLayerReport(
        a.ffn.name, a.reason, a.ffn.hidden, 0, a.ffn.hidden, [], [], 0.0, router_accuracy=a.accuracy, scores=a.score
    )
    if built is None:
        return dense
    layer = built.layer
    return replace(
        dense, status="routed", experts=layer.num_experts, union=layer.union, widths=layer.widths, share=built.share,
        ranks=layer.ranks, tokens=built.tokens, refit=built.refit,
    )  # fmt: skip
