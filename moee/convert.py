"""Extraction: from a dense model and calibration images to a model whose MLPs are routed experts."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moee.allocation import Allocation, Candidate, allocate
from moee.assembly import build_layer
from moee.calibration import LayerTokens, collect_tokens
from moee.config import ExtractConfig
from moee.data import ImageSet, batches
from moee.errors import UserError
from moee.grouping import RoutedLayer, find_routes
from moee.layer import Experts, RoutedFFN
from moee.layer_report import LayerReport
from moee.metrics import dense_macs, tokens_per_image
from moee.models import FFN, find_ffns, replace_module
from moee.moefication import find_moefication
from moee.progress import Reporter, silent
from moee.refit import refit
from moee.selection import keep_by_share, select_neurons
from moee.sensitivity import RoutedStats, measure_sensitivity


def extract(
    model: nn.Module, data: ImageSet, config: ExtractConfig, report: Reporter = silent, scratch: Path | None = None, jobs: int = 1
) -> list[LayerReport]:
    """Replace the MLPs of `model` in place by routed experts found on `data`; returns one report a layer.

    Calibration tokens lie on disk under `scratch` (a temporary folder by default) while it runs. Deterministic for one
    configuration, data set and thread count. Cluster labels are cached, so an interrupted run does not cluster a
    finished layer again; `jobs` layers are clustered side by side. Raises `UserError` for input it cannot work with;
    the model is then unchanged.
    """
    ffns = find_ffns(model, config.exclude)
    with tempfile.TemporaryDirectory(prefix="moee-", dir=scratch) as folder:
        sampled = collect_tokens(model, ffns, data, Path(folder), config.tokens, config.seed, report)
        report("experts", 0, len(ffns))
        threads = torch.get_num_threads()
        found: list[RoutedLayer | LayerReport | tuple[Experts, LayerReport]] = []
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            for result in pool.map(lambda pair: _find(pair[0], pair[1], config, report), zip(ffns, sampled, strict=True)):
                found.append(result)
                report("experts", len(found), len(ffns))
        torch.set_num_threads(threads)  # fits that run side by side each set and restore it, in any order
    routed = {r.ffn.name: r for r in found if isinstance(r, RoutedLayer)}
    kept = choose_neurons(model, routed, data, config, report)
    reports, layers = [], {}
    for ffn, result in zip(ffns, found, strict=True):
        if isinstance(result, RoutedLayer):
            result = build_layer(result, kept.get(ffn.name), config)
        experts, layer_report = result if isinstance(result, tuple) else (None, result)
        if experts is not None:
            layers[ffn.name] = RoutedFFN(experts, ffn.channels_first)
        reports.append(layer_report)
    if not layers:
        raise UserError("no layer showed two clusters, so the model would stay dense; add images or lower --min-cluster-size")
    for name, layer in layers.items():
        replace_module(model, name, layer)
    if config.compensation == "refit":
        refit(model, layers, {f.name: f for f in ffns}, data, config.refit_tokens, config.refit_lambda, report)
    return reports


def _find(ffn: FFN, sampled: LayerTokens, config: ExtractConfig, report: Reporter) -> Any:
    return find_moefication(ffn, sampled, config) if config.method == "moefication" else find_routes(ffn, sampled, config, report)


def choose_neurons(
    model: nn.Module, routed: dict[str, RoutedLayer], data: ImageSet, config: ExtractConfig, report: Reporter = silent
) -> dict[str, list[Tensor]]:
    """Per layer and expert, the ascending ids of the neurons to keep; a layer that would cost as much as dense is left out."""
    if config.criterion != "sensitivity":
        return {
            name: select_neurons(r.moments, r.ffn, config.criterion, config.keep, config.seed) for name, r in routed.items()
        }
    if not routed:
        return {}
    error = sensitivity_of(model, routed, data, config, report)
    if config.allocation == "expert":
        return {name: [keep_by_share(row, config.keep) for row in e] for name, e in error.items()}
    size = next(batches(data, 1)).images.shape[-1]
    tokens = tokens_per_image(model, routed, size)
    candidates = {n: Candidate(error[n], r.share, tokens[n], r.ffn.dim) for n, r in routed.items()}
    budget = None
    if config.target_macs is not None:
        total = dense_macs(model, size)
        budget = ffn_budget(total, sum(c.dense_macs for c in candidates.values()), config.target_macs)
    return worthwhile(candidates, allocate(candidates, budget, config.keep))


def sensitivity_of(
    model: nn.Module, routed: dict[str, RoutedLayer], data: ImageSet, config: ExtractConfig, report: Reporter = silent
) -> dict[str, Tensor]:
    """Sensitivity a token [K, H] of every routed layer's experts and neurons."""
    ffns = {name: r.ffn for name, r in routed.items()}
    stats = {name: RoutedStats(r.router, r.bias, r.moments.mean) for name, r in routed.items()}
    return measure_sensitivity(
        model, ffns, stats, data, config.sensitivity_tokens, config.objective, config.seed, report
    )


def ffn_budget(total: int, ffn: int, target: float) -> float:
    """MACs left to the routed layers so that a model of `total` MACs, `ffn` of them in these layers, ends at the share `target`.

    Raises `UserError` if nothing would be left.
    """
    budget = ffn - (1 - target) * total
    if budget <= 0:
        raise UserError(
            f"--target-macs {target:g}: the routed MLPs hold {ffn / total:.0%} of the MACs, so the result stays above "
            f"{1 - ffn / total:.2f}"
        )
    return budget


def worthwhile(candidates: dict[str, Candidate], allocation: Allocation) -> dict[str, list[Tensor]]:
    """The allocation without layers whose experts cost as much as the dense layer: those stay dense."""
    kept = {}
    for name, c in candidates.items():
        widths = torch.tensor([len(k) for k in allocation.kept[name]], dtype=torch.float64)
        if c.router_macs + 2 * c.tokens * c.dim * float(widths @ c.share) < c.dense_macs:
            kept[name] = allocation.kept[name]
    return kept
