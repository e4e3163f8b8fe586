"""Group one layer's tokens: cluster them, make the router, take each expert's activation moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moee.calibrate.calibration import CHUNK, LayerTokens, hidden_activations
from moee.calibrate.options import CalibrationOptions, GroupingOptions
from moee.calibrate.selection import MomentAccumulator, Moments
from moee.clustering.base import NOISE
from moee.clustering.cluster import cluster_tokens
from moee.config import PAPER_TOKENS
from moee.errors import chosen
from moee.layers.report import LayerReport, left_dense
from moee.layers.routing import make_router, route
from moee.models.ffn import FFN
from moee.parallel.devices import CPU
from moee.progress import Reporter, silent
from moee.store.cache import read_labels, tensor_hash, write_labels

MIN_EXPERT_TOKENS = 2  # an expert needs a variance


@dataclass(frozen=True)
class GroupedLayer:
    """A layer whose tokens have been grouped: its router, the activation moments of each expert, each expert's share [K]
    of the calibration tokens, and the share of clustered tokens that were noise."""

    ffn: FFN
    router: Tensor
    bias: Tensor
    moments: Moments
    share: Tensor
    noise: float


def find_routes(
    ffn: FFN, sampled: LayerTokens, config: GroupingOptions, report: Reporter = silent, device: torch.device = CPU
) -> GroupedLayer | LayerReport:
    """Cluster one layer's tokens and make its router; a `LayerReport` with the reason when it stays dense. Activations are
    computed, clustered by HDBSCAN and averaged on `device`; scikit-learn's clusterings run on the CPU."""
    near = ffn.to(device)
    members = _drawn(sampled, config.cluster_tokens, config.seed)
    labels = _labels(ffn, members, config, report, device)
    count = int(labels.max()) + 1 if len(labels) else 0
    noise = float((labels == NOISE).double().mean())
    if count < 2:
        return stays_dense(ffn, f"dense: {count} cluster{'s' if count != 1 else ''}, {noise:.0%} noise", noise)
    router, bias = make_router(config.routing, members, labels, count, config.seed)
    router, bias, routes = _routes_without_idle(sampled, router, bias, device)

    def of_clusters() -> Moments:
        own = labels if len(router) == count else route(members, router, bias)[:, 0]
        return _moments(near, members, own, len(router))

    makers = {"cluster": of_clusters, "routed": lambda: _moments(near, sampled, routes, len(router))}
    moments = chosen(makers, config.statistics, "statistics")()
    share = torch.bincount(routes, minlength=len(router)).double() / len(routes)
    return GroupedLayer(ffn, router, bias, moments, share, noise)


def one_group(ffn: FFN, sampled: LayerTokens, config: CalibrationOptions, device: torch.device = CPU) -> GroupedLayer:
    """All tokens of a layer as one group, whose router has nothing to choose."""
    members = _drawn(sampled, PAPER_TOKENS, config.seed)
    router, bias = make_router("cosine", members, torch.zeros(len(members), dtype=torch.int64), 1, config.seed)
    moments = _moments(ffn.to(device), sampled, torch.zeros(sampled.count, dtype=torch.int64), 1)
    return GroupedLayer(ffn, router, bias, moments, torch.ones(1, dtype=torch.float64), 0.0)


def _drawn(sampled: LayerTokens, most: int, seed: int) -> Tensor:
    """At most so many of a layer's tokens, drawn by the seed, in their order."""
    generator = torch.Generator().manual_seed(seed)
    return sampled.load(torch.randperm(sampled.count, generator=generator)[:most].sort().values)


def stays_dense(ffn: FFN, reason: str, noise: float = 0.0) -> LayerReport:
    """The report of a layer that was left as it was."""
    return left_dense(ffn.name, reason, ffn.hidden, noise)


def _labels(ffn: FFN, tokens: Tensor, config: GroupingOptions, report: Reporter, device: torch.device) -> Tensor:
    """Cluster labels [N] of a layer's tokens, from the cache if the same tokens were clustered the same way before."""
    key = tensor_hash(tokens, ffn.w_up, ffn.b_up, extra=f"labels/2 {ffn.activation} {config.clustering_json()}")
    labels = read_labels(key, len(tokens))
    if labels is None:
        hidden = hidden_activations(ffn.to(device), tokens.to(device))
        labels = cluster_tokens(hidden, config, report, f"cluster {ffn.name}")
        write_labels(key, labels)
    return labels


def _routes_without_idle(
    sampled: LayerTokens, router: Tensor, bias: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Routes [N] of all sampled tokens, after experts that (almost) no token reaches have been taken out."""
    while True:
        routes = torch.cat([
            route(sampled.load(part).to(device), router.to(device), bias.to(device))[:, 0].cpu()
            for part in torch.arange(sampled.count).split(CHUNK)
        ])  # fmt: skip
        busy = torch.bincount(routes, minlength=len(router)) >= MIN_EXPERT_TOKENS
        if busy.all():
            return router, bias, routes
        router, bias = router[busy], bias[busy]


def _moments(ffn: FFN, tokens: LayerTokens | Tensor, experts: Tensor, count: int) -> Moments:
    device = ffn.w_up.device
    accumulator = MomentAccumulator(count, ffn.hidden, device)
    for part in torch.arange(len(experts)).split(CHUNK):
        inputs = tokens[part] if isinstance(tokens, Tensor) else tokens.load(part)
        accumulator.add(hidden_activations(ffn, inputs.to(device)), experts[part].to(device))
    return accumulator.finish()
