"""CLEAR-MoE from a dense model and calibration images: cluster, score, choose ranks, decompose front to back.

Two passes. The first, over the dense model, finds every layer's clusters, router, scores and loss tables. The second builds the
layers on the inputs that the converted layers before them really produce. Nothing outside the selected MLPs is touched.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moee.calibration import CHUNK, as_tokens, collect_tokens
from moee.clear_moe.config import ClearConfig
from moee.clear_moe.decompose import (
    Moments,
    check_rank,
    decompose_down,
    decompose_up,
    dense_hidden,
    full_rank,
    moments,
    output_scale,
    refit_down,
    sqrt_and_inverse,
    up_metric,
)
from moee.clear_moe.layer import ClearFFN, ClearParts
from moee.clear_moe.ranks import LayerCost, LossTable, loss_table, ranks_for_budget
from moee.clear_moe.routers import Router, fit_router
from moee.clear_moe.scoring import LayerScore, combine, score_layer
from moee.data import ImageSet, TensorSet, batches
from moee.errors import UserError
from moee.metrics import dense_macs, tokens_per_image
from moee.models import FFN, activate, find_ffns, replace_module
from moee.progress import Reporter, silent

CLUSTER_TOKENS = 4096  # of a layer that k-means sees; the router learns from the same
SCORE_IMAGES = 32
Ranks = tuple[int, int, int, int]


@dataclass(frozen=True)
class ClearLayerReport:
    """What happened to one MLP. `ranks` are (up, up residual, down, down residual); widths as in `ClearFFN`."""

    name: str
    status: str
    hidden: int
    experts: int
    union: int
    widths: list[int]
    share: list[float]
    ranks: Ranks | None = None
    router_accuracy: float | None = None
    scores: LayerScore | None = None
    noise: float = 0.0

    @property
    def mean_width(self) -> float:
        """Hidden neurons of a dense MLP of equal MACs."""
        return float(self.widths[0]) if self.widths else float(self.hidden)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean_width": self.mean_width}


@dataclass
class _Analysis:
    """What the first pass knows of a layer."""

    ffn: FFN
    router: Router
    accuracy: float
    tables: tuple[LossTable, LossTable] | None = None
    score: LayerScore | None = None
    ranks: Ranks | None = None
    reason: str = field(default="")


def calibration_set(data: ImageSet, count: int, seed: int) -> TensorSet:
    """`count` images drawn without replacement (all, if there are fewer), in memory."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    images = torch.cat([batch.images for batch in batches(data, 32, order=order)])
    return TensorSet("calibration", images, [-1] * len(images), 0)


def cluster(tokens: Tensor, experts: int, seed: int, name: str = "layer") -> Tensor:
    """k-means labels [N] of input tokens [N, D]. Raises `UserError` if the tokens hold fewer clusters than experts."""
    from sklearn.cluster import KMeans

    if len(tokens) < experts:
        raise UserError(
            f"`{name}` has {len(tokens)} calibration tokens for {experts} experts; give more --calibration-images or --tokens"
        )
    if experts == 1:
        return torch.zeros(len(tokens), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of what is raised below
        labels = KMeans(experts, n_init=1, random_state=seed).fit_predict(tokens.numpy())
    found = len(set(labels.tolist()))
    if found < experts:
        raise UserError(
            f"`{name}`: k-means found {found} distinct clusters for {experts} experts; lower --experts or give more "
            "--calibration-images"
        )
    return torch.from_numpy(labels).long()


@torch.no_grad()
def convert(model: nn.Module, data: ImageSet, config: ClearConfig, report: Reporter = silent) -> list[ClearLayerReport]:
    """Replace MLPs of `model` in place by `ClearFFN` layers found on `data`; returns one report a layer.

    Deterministic for one configuration, data set and thread count. Weights outside the replaced MLPs keep their bits. Raises
    `UserError` for input that it cannot work with; the model is then unchanged.
    """
    ffns = find_ffns(model, config.exclude)
    if config.layers is not None and config.layers > len(ffns):
        raise UserError(f"--layers {config.layers} is more than the {len(ffns)} MLPs of this model; give at most {len(ffns)}")
    if config.rank is not None:
        for ffn in ffns:
            check_rank(ffn, config.rank, config.residual_rank or 0)
    chosen = calibration_set(data, config.calibration_images, config.seed)
    if len(chosen) < config.experts:
        raise UserError(f"{len(chosen)} calibration images are fewer than the {config.experts} experts; give more images")
    found = _analyse(model, ffns, chosen, config, report)
    _choose(model, found, chosen.images.shape[-1], config)
    selected = [a for a in found if a.ranks is not None]
    if not selected:
        raise UserError("no layer gets cheaper at these ranks, so the model would stay dense; lower --rank or --energy")
    layers = _build(model, selected, chosen.images, config, report)
    return [_report(a, *layers.get(a.ffn.name, (None, None))) for a in found]


def _report(a: _Analysis, layer: ClearFFN | None, share: list[float] | None) -> ClearLayerReport:
    if layer is None or share is None:
        return ClearLayerReport(a.ffn.name, a.reason, a.ffn.hidden, 0, a.ffn.hidden, [], [], None, a.accuracy, a.score)
    return ClearLayerReport(
        a.ffn.name, "routed", a.ffn.hidden, layer.num_experts, layer.union, layer.widths, share, layer.ranks, a.accuracy, a.score
    )


def _analyse(
    model: nn.Module, ffns: list[FFN], chosen: TensorSet, config: ClearConfig, report: Reporter
) -> list[_Analysis]:
    """Clusters, routers, loss tables and scores of all layers on the dense model's own tokens."""
    found = []
    images = chosen.images[:SCORE_IMAGES]
    reference = model(images) if config.score else torch.zeros(0)
    with tempfile.TemporaryDirectory(prefix="moee-") as folder:
        sampled = collect_tokens(model, ffns, chosen, Path(folder), config.tokens, config.seed, report)
        report("analyse", 0, len(ffns))
        for position, (ffn, store) in enumerate(zip(ffns, sampled, strict=True), 1):
            tokens = store.load()
            order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(config.seed))[:CLUSTER_TOKENS]
            sample = tokens[order.sort().values]
            labels = cluster(sample, config.experts, config.seed, ffn.name)
            router, accuracy = fit_router(config.router, sample, labels, config.experts, config.router_width, config.seed)
            a = _Analysis(ffn, router, accuracy)
            if config.rank is None:
                a.tables = _tables(ffn, tokens, router, config)
            if config.score:
                rank = config.rank or full_rank(ffn) // 2
                a.score = score_layer(
                    model, ffn, tokens, images, reference, rank, config.experts, config.metric, config.seed
                )
            found.append(a)
            report("analyse", position, len(ffns))
    if config.score:
        for a, score in zip(found, combine([a.score for a in found if a.score is not None]), strict=True):
            a.score = score
    return found


def _tables(ffn: FFN, tokens: Tensor, router: Router, config: ClearConfig) -> tuple[LossTable, LossTable]:
    """Loss tables of both maps on the dense layer's tokens."""
    routes = router.route(tokens)
    root, _ = sqrt_and_inverse(up_metric(ffn, tokens, config.metric))
    before: Moments = moments(tokens, routes, config.experts).through(root)
    outputs = dense_hidden(ffn, tokens) @ ffn.w_down.T * output_scale(ffn).float()
    after = moments(outputs, routes, config.experts)
    full = full_rank(ffn)
    return loss_table(before, full, config.residual_rank), loss_table(after, full, config.residual_rank)


def _choose(model: nn.Module, found: list[_Analysis], size: int, config: ClearConfig) -> None:
    """Fill in the ranks of the layers to convert, and the reason of the others."""
    tokens = tokens_per_image(model, [a.ffn.name for a in found], size)
    costs = [
        LayerCost(
            dense=2.0 * tokens[a.ffn.name] * a.ffn.dim * a.ffn.hidden,
            unit=float(tokens[a.ffn.name]) * (a.ffn.dim + a.ffn.hidden),
            router=float(tokens[a.ffn.name]) * a.router.macs,
            gain=_gain(a),
        )
        for a in found
    ]
    order = sorted(range(len(found)), key=lambda i: -found[i].score.score if found[i].score else 0.0)  # type: ignore[union-attr]
    picked = sorted(order[: config.layers])
    macs = float(dense_macs(model, size))
    for i, a in enumerate(found):
        a.reason = "dense: not selected" if i not in picked else "dense: would not get cheaper"
    if config.rank is not None:
        ranks: Ranks = (config.rank, config.residual_rank or 0) * 2  # type: ignore[assignment]
        if config.target_macs is not None:
            picked = _until_budget(found, costs, order, sum(ranks), macs, config.target_macs)
        for i in picked:
            found[i].ranks = ranks
        return
    tables = [found[i].tables for i in picked]
    assert all(t is not None for t in tables), "the first pass made them, since no rank was given"
    if config.target_macs is not None:
        other = macs - sum(costs[i].dense for i in picked)
        pairs = [t for t in tables if t is not None]
        solved = ranks_for_budget(pairs, [costs[i] for i in picked], other, config.target_macs * macs, config.residual_rank)
    else:
        energy = config.kept_energy
        assert energy is not None, "the configuration gives a rank, an energy or a budget"
        solved = []
        for i, pair in zip(picked, tables, strict=True):
            assert pair is not None, "see above"
            r = (*pair[0].for_energy(energy, config.residual_rank), *pair[1].for_energy(energy, config.residual_rank))
            solved.append(r if costs[i].of(sum(r)) < costs[i].dense else None)
    for i, r4 in zip(picked, solved, strict=True):
        found[i].ranks = r4


def _gain(a: _Analysis) -> float:
    """Squared change of the model's output for one unit of block-output error, from the layer's measured sensitivity."""
    if a.score is None or a.tables is None:
        return 1.0
    rank = a.score.rank
    error = 0.0
    for table in a.tables:
        nearest = min(range(len(table.ranks)), key=lambda i: abs(table.ranks[i] - rank))  # noqa: B023
        error += table.total * float(table.loss[nearest, 0])
    return a.score.sensitivity**2 / max(error, 1e-30)


def _until_budget(
    found: list[_Analysis], costs: list[LayerCost], order: list[int], units: int, macs: float, target: float
) -> list[int]:
    """The fewest layers, best scores first, that bring the model within `target` of its MACs at a rank given by hand."""
    picked: list[int] = []
    total = macs
    for i in order:
        if total <= target * macs:
            break
        if costs[i].of(units) < costs[i].dense:
            total += costs[i].of(units) - costs[i].dense
            picked.append(i)
        else:
            found[i].reason = "dense: would not get cheaper"
    if total > target * macs:
        raise UserError(
            f"--target-macs {target}: this --rank reaches {total / macs:.3f} of the dense model's multiply-accumulates with "
            "every layer converted; lower --rank or raise the target"
        )
    return sorted(picked)


class _BuildStep(nn.Module):
    """Stands where a layer will be for one forward pass: builds it on the pass's own input, then applies it."""

    def __init__(self, analysis: _Analysis, config: ClearConfig, done):
        super().__init__()
        self.analysis, self.config, self.done = analysis, config, done
        self.built: ClearFFN | None = None
        self.share: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        ffn = self.analysis.ffn
        tokens = as_tokens(x, ffn.channels_first)
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(self.config.seed))[: self.config.tokens]
        self.built, self.share = build_layer(self.analysis, tokens[order.sort().values], self.config)
        self.done()
        per_image = max(1, len(tokens) // len(x))
        return torch.cat([self.built(part) for part in x.split(max(1, CHUNK // per_image))])


def build_layer(a: _Analysis, tokens: Tensor, config: ClearConfig) -> tuple[ClearFFN, list[float]]:
    """A layer from its input tokens [N, D], and each expert's share of them."""
    assert a.ranks is not None, "only layers with ranks are built"
    r1, q1, r2, q2 = a.ranks
    ffn, k = a.ffn, config.experts
    routes = a.router.route(tokens)
    up = decompose_up(ffn, tokens, routes, k, r1, q1, up_metric(ffn, tokens, config.metric))
    hidden = _hidden(up, tokens, routes, ffn.activation)
    target = dense_hidden(ffn, tokens) @ ffn.w_down.T
    weight = refit_down(ffn, hidden, target, routes, k, config.refit_lambda) if config.refit else ffn.w_down
    down = decompose_down(ffn, hidden, target, routes, k, r2, q2, weight)
    share = torch.bincount(routes, minlength=k).double() / len(routes)
    return ClearFFN(ClearParts(a.router, up, down, ffn.activation), ffn.channels_first).eval(), share.tolist()


def _hidden(up, tokens: Tensor, routes: Tensor, activation: str) -> Tensor:
    """Hidden activations [N, H] of the decomposed up map."""
    hidden = up.shared(tokens) + up.bias[routes]
    for e in range(len(up.bias)) if up.residual else ():
        mine = (routes == e).nonzero()[:, 0]
        hidden[mine] += (tokens[mine] @ up.expert_in[e].T) @ up.expert_out[e]
    return activate(hidden, activation)


def _build(
    model: nn.Module, selected: list[_Analysis], images: Tensor, config: ClearConfig, report: Reporter
) -> dict[str, tuple[ClearFFN, list[float]]]:
    """Put the layers in place, front to back, in one forward pass; an error puts the dense ones back."""
    dense = {a.ffn.name: model.get_submodule(a.ffn.name) for a in selected}
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        report("decompose", done, len(selected))

    steps = {a.ffn.name: _BuildStep(a, config, count) for a in selected}
    for name, step in steps.items():
        replace_module(model, name, step)
    try:
        report("decompose", 0, len(selected))
        model(images)
    except BaseException:
        for name, module in dense.items():
            replace_module(model, name, module)
        raise
    built = {}
    for name, step in steps.items():
        assert step.built is not None, f"the forward pass does not run `{name}`"
        replace_module(model, name, step.built)
        built[name] = (step.built, step.share)
    return built
