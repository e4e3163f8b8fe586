"""Extraction: from a dense model and calibration images to a model whose MLPs are routed experts."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from moee.cache import read_labels, tensor_hash, write_labels
from moee.calibration import CHUNK, LayerTokens, collect_tokens, hidden_activations
from moee.clustering import NOISE, cluster_tokens
from moee.config import ExtractConfig
from moee.data import ImageSet
from moee.errors import NothingRouted
from moee.layer import LOAD_UNIT, Experts, RoutedFFN
from moee.layer_report import LayerReport
from moee.models import FFN, find_ffns, replace_module
from moee.moefication import find_moefication
from moee.progress import Reporter, silent
from moee.refit import refit
from moee.routing import make_router, route
from moee.selection import MomentAccumulator, Moments, select_neurons

CLUSTERING_FIELDS = {"seed", "clustering", "components", "min_cluster_size", "min_samples", "clusters", "eps"}
MIN_EXPERT_TOKENS = 2  # an expert needs a variance


def extract(
    model: nn.Module, data: ImageSet, config: ExtractConfig, report: Reporter = silent, scratch: Path | None = None,
    jobs: int = 1, sampled: list[LayerTokens] | None = None,
) -> list[LayerReport]:  # fmt: skip
    """Replace the MLPs of `model` in place by routed experts found on `data`; returns one report a layer.

    Calibration tokens lie on disk under `scratch` (a temporary folder by default) while it runs. Deterministic for one
    configuration, data set and thread count. Cluster labels are cached, so an interrupted run does not cluster a
    finished layer again; `jobs` layers are clustered side by side. `sampled`, the tokens of an earlier calibration of the
    same dense model (one entry an MLP), saves collecting them again. Raises `UserError` for input it cannot work with;
    the model is then unchanged.
    """
    ffns = find_ffns(model, config.exclude)
    reports, layers = [], {}
    with tempfile.TemporaryDirectory(prefix="moee-", dir=scratch) as folder:
        sampled = sampled or collect_tokens(model, ffns, data, Path(folder), config.tokens, config.seed, report)
        report("experts", 0, len(ffns))
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            found = pool.map(lambda pair: find_experts(pair[0], pair[1], config, report), zip(ffns, sampled, strict=True))
            for position, (ffn, (experts, layer_report)) in enumerate(zip(ffns, found, strict=True), 1):
                if experts is not None:
                    layers[ffn.name] = RoutedFFN(experts, ffn.channels_first)
                reports.append(layer_report)
                report("experts", position, len(ffns))
        torch.set_num_threads(threads)  # fits that run side by side each set and restore it, in any order
    if not layers:
        raise NothingRouted("no layer showed two clusters, so the model would stay dense; add images or lower --min-cluster-size")
    for name, layer in layers.items():
        replace_module(model, name, layer)
    if config.compensation == "refit":
        refit(model, layers, {f.name: f for f in ffns}, data, config.refit_tokens, config.refit_lambda, report)
    return reports


def find_experts(
    ffn: FFN, sampled: LayerTokens, config: ExtractConfig, report: Reporter = silent
) -> tuple[Experts | None, LayerReport]:
    """Cluster one layer's tokens and build its experts, or None with the reason when it stays dense."""
    if config.method == "moefication":
        return find_moefication(ffn, sampled, config)
    generator = torch.Generator().manual_seed(config.seed)
    rows = torch.randperm(sampled.count, generator=generator)[: config.cluster_tokens].sort().values
    members = sampled.load(rows)
    labels = _labels(ffn, members, config, report)
    count = int(labels.max()) + 1 if len(labels) else 0
    noise = float((labels == NOISE).double().mean())
    if count < (1 if config.clustering == "none" else 2):
        reason = f"dense: {count} cluster{'s' if count != 1 else ''}, {noise:.0%} noise"
        return None, LayerReport(ffn.name, reason, ffn.hidden, 0, ffn.hidden, [], [], noise)
    router, bias = make_router(config.routing, members, labels, count, config.seed)
    router, bias, routes = _routes_without_idle(sampled, router, bias)
    if config.statistics == "cluster":
        labels = labels if len(router) == count else route(members, router, bias)[:, 0]
        moments = _moments(ffn, members, labels, len(router))
    else:
        moments = _moments(ffn, sampled, routes, len(router))
    share = torch.bincount(routes, minlength=len(router)).double() / len(routes)
    experts = assemble(ffn, moments, router, bias, config, share)
    widths = experts.widths
    return experts, LayerReport(
        ffn.name, "routed", ffn.hidden, len(widths), len(experts.w_up), widths, share.tolist(), noise
    )


def _labels(ffn: FFN, tokens: Tensor, config: ExtractConfig, report: Reporter) -> Tensor:
    """Cluster labels [N] of a layer's tokens, from the cache if the same tokens were clustered the same way before."""
    if config.clustering == "none":
        return torch.zeros(len(tokens), dtype=torch.int64)
    how = config.model_dump_json(include=CLUSTERING_FIELDS)
    key = tensor_hash(tokens, ffn.w_up, ffn.b_up, extra=f"labels/2 {ffn.activation} {how}")
    labels = read_labels(key, len(tokens))
    if labels is None:
        labels = cluster_tokens(hidden_activations(ffn, tokens), config, report, f"cluster {ffn.name}")
        write_labels(key, labels)
    return labels


def _routes_without_idle(sampled: LayerTokens, router: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Routes [N] of all sampled tokens, after experts that (almost) no token reaches have been taken out."""
    while True:
        routes = torch.cat([
            route(sampled.load(part), router, bias)[:, 0] for part in torch.arange(sampled.count).split(CHUNK)
        ])  # fmt: skip
        busy = torch.bincount(routes, minlength=len(router)) >= MIN_EXPERT_TOKENS
        if busy.all():
            return router, bias, routes
        router, bias = router[busy], bias[busy]


def _moments(ffn: FFN, tokens: LayerTokens | Tensor, experts: Tensor, count: int) -> Moments:
    accumulator = MomentAccumulator(count, ffn.hidden)
    for part in torch.arange(len(experts)).split(CHUNK):
        inputs = tokens[part] if isinstance(tokens, Tensor) else tokens.load(part)
        accumulator.add(hidden_activations(ffn, inputs), experts[part])
    return accumulator.finish()


def assemble(
    ffn: FFN, moments: Moments, router: Tensor, router_bias: Tensor, config: ExtractConfig, share: Tensor
) -> Experts:
    """Select each expert's neurons, gather their union into one store and compute the output biases.

    With compensation, b_out[e] = b + sum over dropped j of E[a_j | e] * W2[:, j] (design rule: dropped neurons are
    replaced by their mean); without, b_out[e] = b.
    """
    kept = select_neurons(moments, ffn, config.criterion, config.keep, config.seed)
    union = torch.cat(kept).unique()
    position = torch.full((ffn.hidden,), -1, dtype=torch.int64)
    position[union] = torch.arange(len(union))
    biases = []
    for e, neurons in enumerate(kept):
        dropped = moments.mean[e].clone()
        dropped[neurons] = 0
        extra = ffn.w_down.double() @ dropped if config.compensation != "none" else 0
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
