"""First pass of CLEAR-MoE, over the dense model: every layer's clusters, router, scores and loss tables."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moee.calibrate.calibration import collect_tokens
from moee.cures import cures
from moee.data.image_set import ImageSet, TensorSet, batches
from moee.errors import UserError
from moee.layers.clear_routers import Router, fit_router
from moee.methods.clear_moe.decompose import (
    Moments,
    dense_hidden,
    full_rank,
    moments,
    output_scale,
    sqrt_and_inverse,
    up_metric,
)
from moee.methods.clear_moe.options import ClearOptions
from moee.methods.clear_moe.ranks import LossTable, loss_table
from moee.methods.clear_moe.scoring import LayerScore, combine, score_layer
from moee.models.ffn import FFN
from moee.parallel.devices import CPU, placed
from moee.parallel.group import Group
from moee.progress import Reporter
from moee.store.scratch import temporary_folder

CLUSTER_TOKENS = 4096  # of a layer that k-means sees; the router learns from the same
SCORE_IMAGES = 32
Ranks = tuple[int, int, int, int]


@dataclass
class Analysis:
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
            f"`{name}` has {len(tokens)} calibration tokens for {experts} experts; "
            + cures("give more --calibration-images", "give more --tokens", elsewhere="give more images")
        )
    if experts == 1:
        return torch.zeros(len(tokens), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of what is raised below
        labels = KMeans(experts, n_init=1, random_state=seed).fit_predict(tokens.numpy())
    found = len(set(labels.tolist()))
    if found < experts:
        raise UserError(
            f"`{name}`: k-means found {found} distinct clusters for {experts} experts; "
            + cures("lower --experts", "give more --calibration-images", elsewhere="give more images")
        )
    return torch.from_numpy(labels).long()


def analyse(
    model: nn.Module, ffns: list[FFN], chosen: TensorSet, config: ClearOptions, report: Reporter, *, device: torch.device = CPU
) -> list[Analysis]:
    """Clusters, routers, loss tables and scores of all layers on the dense model's own tokens; the model runs on `device`."""
    found = []
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder())
        sampled = collect_tokens(
            model, ffns, chosen, folder, config.tokens, seed=config.seed, report=report, group=Group(device=device)
        )
        stack.enter_context(placed(model, device))
        images = chosen.images[:SCORE_IMAGES].to(device)
        reference = model(images) if config.score else torch.zeros(0)
        report("analyse", 0, len(ffns))
        for position, (ffn, store) in enumerate(zip(ffns, sampled, strict=True), 1):
            tokens = store.load()
            order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(config.seed))[:CLUSTER_TOKENS]
            sample = tokens[order.sort().values]
            labels = cluster(sample, config.experts, config.seed, ffn.name)
            router, accuracy = fit_router(config.router, sample, labels, config.experts, config.router_width, seed=config.seed)
            a = Analysis(ffn, router, accuracy)
            if config.rank is None:
                a.tables = _tables(ffn, tokens, router, config)
            if config.score:
                rank = config.rank or full_rank(ffn) // 2
                a.score = score_layer(
                    model, ffn, tokens, images, reference, rank=rank, clusters=config.experts, metric=config.metric,
                    seed=config.seed
                )
            found.append(a)
            report("analyse", position, len(ffns))
    if config.score:
        for a, score in zip(found, combine([a.score for a in found if a.score is not None]), strict=True):
            a.score = score
    return found


def _tables(ffn: FFN, tokens: Tensor, router: Router, config: ClearOptions) -> tuple[LossTable, LossTable]:
    """Loss tables of both maps on the dense layer's tokens."""
    routes = router.route(tokens)
    root, _ = sqrt_and_inverse(up_metric(ffn, tokens, config.metric))
    before: Moments = moments(tokens, routes, config.experts).through(root)
    outputs = dense_hidden(ffn, tokens) @ ffn.w_down.T * output_scale(ffn).float()
    after = moments(outputs, routes, config.experts)
    full = full_rank(ffn)
    return loss_table(before, full, config.residual_rank), loss_table(after, full, config.residual_rank)
