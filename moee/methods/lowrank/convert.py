"""Low-rank maps from a dense model and calibration images: CLEAR-MoE's decomposition with one expert and no residual.

With one expert the basis of a map W is the leading eigenvectors of W C W', C the covariance of its inputs: the left singular
vectors of W L for C = L L', the Cholesky factor, which SVD-LLM whitens by. So the error on the calibration tokens is the least
that the rank allows. The mean needs no rank, since a bias holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from moee.cures import cures, without
from moee.data.image_set import ImageSet, image_shape
from moee.data.transform import model_transform
from moee.errors import NothingRouted, OutOfReach
from moee.layers.clear import ClearFFN
from moee.layers.clear_routers import linear_parts
from moee.layers.low_rank import LowRankFFN, LowRankWeights
from moee.layers.report import LayerReport, left_dense
from moee.measure.metrics import original_macs, saved_macs, tokens_per_image
from moee.methods.clear_moe.analysis import Analysis, analyse, calibration_set
from moee.methods.clear_moe.build import Built, build_layers
from moee.methods.clear_moe.choice import choose_ranks
from moee.methods.clear_moe.options import ClearOptions
from moee.methods.lowrank.options import LowRankOptions
from moee.methods.neurons.choice import ffn_budget
from moee.mlps.find import find_ffns, reports_of
from moee.mlps.sites import put_mlp
from moee.models.ffn import FFN
from moee.models.model import Shape
from moee.parallel.devices import CPU
from moee.progress import Reporter, silent

SHARED = ("seed", "exclude", "calibration_images", "tokens", "metric", "compensation", "refit_lambda")


@dataclass(frozen=True)
class LowRankReport(LayerReport):
    """What happened to one MLP; `low_ranks` are those of its up and its down map, None where it stayed dense."""

    low_ranks: tuple[int, int] | None = None


def rank_for(ffn: FFN, keep: float) -> int:
    """The rank of both maps with which an MLP costs at most the share `keep` of its MACs."""
    return int(keep * ffn.dim * ffn.hidden / (ffn.dim + ffn.hidden))


def share_of(model: nn.Module, ffns: Sequence[FFN], shape: Shape, options: LowRankOptions) -> float | None:
    """The share of its MACs that every MLP keeps; None where errors decide it layer by layer. Plain errors of different maps are
    of different units, so they decide nothing. Raises `OutOfReach` where an MLP would be left no rank."""
    if options.target_macs is None:
        keep, said = options.keep, f"--keep {options.keep:g}"
    elif options.metric == "output":
        return None
    else:
        tokens = tokens_per_image(model, [ffn.name for ffn in ffns], shape)
        whole = sum(tokens[ffn.name] * ffn.macs for ffn in ffns)
        budget = ffn_budget(original_macs(model, shape), whole, options.target_macs, saved_macs(model, shape))
        keep, said = budget / whole, f"--target-macs {options.target_macs:g}"
    for ffn in ffns:
        if not rank_for(ffn, keep):
            raise OutOfReach(
                f"{said} leaves `{ffn.name}` no rank; "
                + cures("give a larger share", without(ffn.name))
            )
    return keep


@torch.no_grad()
def convert(
    model: nn.Module, data: ImageSet, options: LowRankOptions, report: Reporter = silent, device: torch.device = CPU
) -> list[LayerReport]:
    """Replace MLPs of `model` in place by `LowRankFFN` layers found on `data`; returns one report a layer.

    The model runs on `device`; the decompositions, in float64, are made on the CPU. Raises `UserError` for input that it cannot
    work with; the model is then unchanged.
    """
    mlps = find_ffns(model, options.exclude)
    keep = share_of(model, mlps.ffns, model_transform(model).shape, options)
    images = calibration_set(data, options.calibration_images, options.seed)
    config = ClearOptions(
        experts=1, residual_rank=0, router="centroid", **({"target_macs": options.target_macs} if keep is None else {"rank": 1}),
        **{name: getattr(options, name) for name in SHARED},
    )  # fmt: skip
    if keep is None:
        found = analyse(model, mlps.ffns, images, config, report, device=device)
        choose_ranks(model, found, image_shape(images.images), config)
    else:
        found = [_with_rank(ffn, rank_for(ffn, keep)) for ffn in mlps.ffns]
    selected = [a for a in found if a.ranks is not None]
    if not selected:
        raise NothingRouted("no layer gets cheaper at these ranks, so the model would stay dense; lower --target-macs")
    built = build_layers(model, selected, images.images, config, report, device=device)
    for a in selected:
        put_mlp(model, a.ffn.name, low_rank_of(built[a.ffn.name].layer), a.ffn.bypassed)
    return [*(_report(a, built.get(a.ffn.name)) for a in found), *reports_of(mlps)]


def low_rank_of(layer: ClearFFN) -> LowRankFFN:
    """The same function as a layer of one expert without residual, which has nothing to route."""
    parts = layer.parts()
    up, down = parts.up, parts.down
    weights = LowRankWeights(up.inward, up.outward, up.bias[0], down.inward, down.outward, down.bias[0])
    return LowRankFFN(weights, layer.activation, layer.channels_first).eval()


def _with_rank(ffn: FFN, rank: int) -> Analysis:
    router = linear_parts(torch.zeros(1, ffn.dim), torch.zeros(1), ffn.dim)
    return Analysis(ffn, router, accuracy=1.0, ranks=(rank, 0, rank, 0))


def _report(a: Analysis, built: Built | None) -> LayerReport:
    """The report of a layer that was cut, or of one that stayed dense."""
    if built is None:
        return left_dense(a.ffn.name, a.reason, a.ffn.hidden)
    width = low_rank_of(built.layer).union
    whole = LowRankReport(**vars(left_dense(a.ffn.name, "routed", a.ffn.hidden)))
    r1, _, r2, _ = built.layer.ranks
    return replace(
        whole, experts=1, union=width, widths=[width], share=[1.0], tokens=built.tokens, refit=built.refit, low_ranks=(r1, r2)
    )  # fmt: skip
