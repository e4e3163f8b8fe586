"""Extraction: from a dense model and calibration images to a model whose MLPs are routed experts."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moee.calibrate.calibration import LayerTokens, collect_tokens, gather_tokens
from moee.calibrate.grouping import GroupedLayer, find_routes
from moee.calibrate.refit import refit
from moee.calibrate.selection import keep_by_share, select_neurons
from moee.calibrate.sensitivity import RoutedStats, measure_sensitivity
from moee.clustering import PARTITIONS
from moee.config import ExtractConfig
from moee.data.image_set import ImageSet, batches, image_shape, refuse_all_skipped
from moee.data.transform import model_transform
from moee.data.views import widened
from moee.errors import NothingRouted, OutOfReach, StepFailed
from moee.layers.report import LayerReport
from moee.layers.routed import NeuronLayer, RoutedFFN
from moee.measure.metrics import original_macs, tokens_per_image
from moee.methods.allocation import Candidate, allocate
from moee.methods.assembly import build_layer
from moee.methods.exchange import Finding, pack_finding, share_layers, unpack_finding
from moee.methods.gated_pruning import prune_gated
from moee.methods.moefication import find_moefication
from moee.mlps.attention import macs_saved, refuse_wide
from moee.mlps.find import find_ffns, reports_of
from moee.mlps.sites import put_mlp
from moee.models.ffn import FFN
from moee.parallel.devices import CPU, computing_on
from moee.parallel.group import SOLO, Group
from moee.progress import Reporter, silent
from moee.store.atomic import temporary_folder

log = logging.getLogger("moee")
MANY_TOKENS = 30_000  # HDBSCAN's time grows with their square: above it a layer takes minutes on two cores
SHARE_STEPS = 24  # bisections of the kept share: finer than one neuron


@dataclass(frozen=True)
class Prepared:
    """An extraction up to the choice of neurons: the grouped layers, reports of what is no MLP to cut and, for the criterion
    sensitivity, the error [K, H] that dropping each neuron of each expert makes. Different budgets can be applied to it."""

    ffns: list[FFN]
    found: list[Finding]
    error: dict[str, Tensor]
    dense: list[LayerReport] = field(default_factory=list)

    @property
    def routed(self) -> dict[str, GroupedLayer]:
        return {r.ffn.name: r for r in self.found if isinstance(r, GroupedLayer)}


def extract(
    model: nn.Module, data: ImageSet, config: ExtractConfig, report: Reporter = silent, scratch: Path | None = None,
    jobs: int = 1, sampled: list[LayerTokens] | None = None, group: Group = SOLO,
) -> list[LayerReport]:  # fmt: skip
    """Replace the MLPs of `model` in place by routed experts found on `data`; returns one report a layer.

    `model` must have its attention narrowed already where `config` asks for that (`moee.stages.session.Session.start`).
    Calibration tokens lie on disk under `scratch` (a temporary folder by default) while it runs. Deterministic for one
    configuration, data set and thread count. Cluster labels are cached, so an interrupted run does not cluster a
    finished layer again; `jobs` layers are clustered side by side. `sampled`, the tokens of an earlier calibration of the
    same dense model (every MLP among its entries), saves collecting them again. In a `group` the ranks share the images of the
    calibration and then the layers; rank 0 chooses the neurons and refits, and every rank gets its layers (the reports are
    rank 0's alone). Raises `UserError` for input it cannot work with; the model is then unchanged.
    """
    prepared = prepare(model, data, config, report, scratch, jobs, sampled, group)
    reports: list[LayerReport] = []
    with group.agreed():
        if group.leader:
            reports = apply(model, prepared, data, config, report, group.device)
    share_layers(model, group)
    return reports


def prepare(
    model: nn.Module, data: ImageSet, config: ExtractConfig, report: Reporter = silent, scratch: Path | None = None,
    jobs: int = 1, sampled: list[LayerTokens] | None = None, group: Group = SOLO,
) -> Prepared:  # fmt: skip
    """The first half of `extract`: calibrate, group each layer's tokens, measure the sensitivity. `model` stays as it is.

    In a `group` only rank 0's result is whole; the others' holds the layers that they worked on.
    """
    with group.agreed():
        refuse_wide(model, config)
        mlps = find_ffns(model, config.exclude, gated=config.static)
    names = [ffn.name for ffn in mlps.ffns]
    if any(theirs != names for theirs in group.all_json(names)):  # they are proved by running them, on machines of many kinds
        raise StepFailed("the ranks do not find the same MLPs in the model; start them on machines of one kind")
    ffns, dense = mlps.ffns, reports_of(mlps)
    found: list[Finding] = []
    with temporary_folder(scratch) as folder:
        if sampled:  # perhaps of more layers than this configuration cuts
            by_name = {tokens.name: tokens for tokens in sampled}
            sampled = [by_name[ffn.name] for ffn in ffns]
        else:
            sampled = calibrate(model, ffns, data, Path(folder), config, report, group)
        mine = list(zip(ffns, sampled if group.alone else gather_tokens(sampled, group), strict=True))
        own = [(ffn, tokens) for ffn, tokens in mine if tokens is not None]
        if group.leader:
            _say_clustered([tokens.count for _, tokens in own], config)
        threads = torch.get_num_threads()
        with group.agreed(), computing_on(group.device):
            report("experts", 0, len(own))
            pool = ThreadPoolExecutor(max(1, jobs))
            try:
                for result in pool.map(lambda pair: _find(pair[0], pair[1], config, report, group.device), own):
                    found.append(result)
                    report("experts", len(found), len(own))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # an interrupt need not wait for a clustering
        torch.set_num_threads(threads)  # fits that run side by side each set and restore it, in any order
    prepared = Prepared(ffns, found if group.alone else _collected(ffns, found, group), {}, dense)
    with group.agreed():
        if group.leader and config.criterion == "sensitivity" and prepared.routed:
            # sums over tokens depend on their order, and a few thousand are enough: one rank's work
            prepared.error.update(sensitivity_of(model, prepared.routed, data, config, report, group.device))
    return prepared


def _say_clustered(counts: list[int], config: ExtractConfig) -> None:
    """Say before minutes of clustering how many tokens it is of, and what makes it quick. `counts`: a layer's tokens each."""
    dense = config.clustering == "hdbscan" or (config.clustering in PARTITIONS and config.clusters is None)
    most = min(max(counts, default=0), config.cluster_tokens or MANY_TOKENS * 1000)
    if config.method == "moee" and dense and most > MANY_TOKENS:
        log.info(
            "%s tokens a layer are clustered, minutes a layer; --cluster-tokens 6000 takes seconds and changes little",
            f"{most:,}",
        )


def calibrate(
    model: nn.Module, ffns: list[FFN], data: ImageSet, folder: Path, config: ExtractConfig, report: Reporter = silent,
    group: Group = SOLO,
) -> list[LayerTokens]:  # fmt: skip
    """`collect_tokens` on `data` and the collages that the configuration asks for; `data.skipped` keeps what is unreadable."""
    seen = widened(data, model_transform(model), 0, config.collages, config.seed)
    sampled = collect_tokens(model, ffns, seen, folder, config.tokens, config.seed, report, group)
    data.skipped.update({index: what for index, what in seen.skipped.items() if index < len(data)})
    with group.agreed():
        refuse_all_skipped(data)
    return sampled


def _collected(ffns: list[FFN], own: list[Finding], group: Group) -> list[Finding]:
    """All layers' findings on rank 0; layer i was rank i mod the world size's."""
    found, waiting = [], iter(own)
    for position, ffn in enumerate(ffns):
        owner = position % group.world
        if group.rank == owner:
            result = next(waiting)
            found.append(result)
            if not group.leader:
                group.send(pack_finding(result), 0)
        elif group.leader:
            found.append(unpack_finding(group.receive(owner), ffn))
    return found


def apply(
    model: nn.Module, prepared: Prepared, data: ImageSet, config: ExtractConfig, report: Reporter = silent,
    device: torch.device = CPU,
) -> list[LayerReport]:  # fmt: skip
    """The second half of `extract`: choose the neurons, replace the MLPs of `model` (which `prepared` was made from), refit on
    `device`."""
    kept = choose_neurons(model, prepared.routed, prepared.error, data, config)
    reports: list[LayerReport] = []
    layers: dict[str, NeuronLayer] = {}
    for ffn, result in zip(prepared.ffns, prepared.found, strict=True):
        layer: NeuronLayer | None = None
        if isinstance(result, GroupedLayer):
            layer, layer_report = (prune_gated if ffn.only_static else build_layer)(result, kept.get(ffn.name), config)
        elif isinstance(result, tuple):
            experts, layer_report = result
            layer = RoutedFFN(experts, ffn.channels_first)
        else:
            layer_report = result
        if layer is not None:
            layers[ffn.name] = layer
        reports.append(layer_report)
    if not layers:
        if prepared.routed:
            raise NothingRouted("experts would cost as much as the dense MLPs in every layer; lower --target-macs or --keep")
        raise NothingRouted("no layer showed two clusters, so the model would stay dense; add images or lower --min-cluster-size")
    parts = {ffn.name: ffn.bypassed for ffn in prepared.ffns}
    for name, layer in layers.items():
        put_mlp(model, name, layer, parts[name])
    if config.compensation == "refit":
        seen = widened(data, model_transform(model), config.augment, config.collages, config.seed)
        ffns = {f.name: f for f in prepared.ffns}
        done = refit(model, layers, ffns, seen, config.refit_tokens, config.refit_lambda, report, device)
        reports = [replace(r, refit=done.get(r.name)) for r in reports]
    return [*reports, *prepared.dense]


def _find(ffn: FFN, sampled: LayerTokens, config: ExtractConfig, report: Reporter, device: torch.device) -> Any:
    if config.method == "moefication":
        return find_moefication(ffn, sampled, config, device)
    return find_routes(ffn, sampled, config, report, device)


def choose_neurons(
    model: nn.Module, routed: dict[str, GroupedLayer], error: dict[str, Tensor], data: ImageSet, config: ExtractConfig
) -> dict[str, list[Tensor]]:
    """Per layer and expert, the ascending ids of the neurons to keep; a layer that would cost as much as dense is left out.

    `error` [K, H] a layer is needed by the criterion sensitivity alone.
    """
    if not routed:
        return {}
    if config.target_macs is None and config.allocation == "expert":
        return {name: _by_expert(r, error.get(name), config, config.keep) for name, r in routed.items()}
    shape = image_shape(next(batches(data, 1)).images)
    tokens = tokens_per_image(model, routed, shape)
    dense = {n: tokens[n] * r.ffn.macs for n, r in routed.items()}
    budget = None
    if config.target_macs is not None:
        budget = ffn_budget(original_macs(model, shape), sum(dense.values()), config.target_macs, macs_saved(model, shape))
    if config.allocation == "expert":
        assert budget is not None
        kept = _share_for(budget, routed, error, tokens, config)
    else:
        candidates = {
            n: Candidate(error[n], r.share, tokens[n], r.ffn.neuron_macs, r.ffn.routing_macs(len(error[n])))
            for n, r in routed.items()
        }
        kept = allocate(candidates, budget, config.keep).kept
    return {n: k for n, k in kept.items() if _macs(routed[n], k, tokens[n]) < dense[n]}


def _by_expert(routed: GroupedLayer, error: Tensor | None, config: ExtractConfig, keep: float) -> list[Tensor]:
    """Each expert's neurons that hold the share `keep` of the criterion in that expert."""
    if config.criterion == "sensitivity":
        assert error is not None
        return [keep_by_share(row, keep) for row in error]
    return select_neurons(routed.moments, routed.ffn, config.criterion, keep, config.seed)


def _macs(routed: GroupedLayer, kept: list[Tensor], tokens: int) -> float:
    """MACs an image of a layer with the given neurons, router included."""
    widths = torch.tensor([len(k) for k in kept], dtype=torch.float64)
    return tokens * (routed.ffn.routing_macs(len(kept)) + routed.ffn.neuron_macs * float(widths @ routed.share))


def _share_for(
    budget: float, routed: dict[str, GroupedLayer], error: dict[str, Tensor], tokens: dict[str, int], config: ExtractConfig
) -> dict[str, list[Tensor]]:
    """The largest share `keep` whose experts cost at most `budget` MACs an image, by bisection."""
    low, high = 0.0, 1.0
    best = {name: _by_expert(r, error.get(name), config, 1e-9) for name, r in routed.items()}
    for _ in range(SHARE_STEPS):
        middle = (low + high) / 2
        kept = {name: _by_expert(r, error.get(name), config, middle) for name, r in routed.items()}
        if sum(_macs(routed[n], k, tokens[n]) for n, k in kept.items()) <= budget:
            best, low = kept, middle
        else:
            high = middle
    return best


def sensitivity_of(
    model: nn.Module, routed: dict[str, GroupedLayer], data: ImageSet, config: ExtractConfig, report: Reporter = silent,
    device: torch.device = CPU,
) -> dict[str, Tensor]:  # fmt: skip
    """Sensitivity a token [K, H] of every routed layer's experts and neurons, measured on `device`."""
    ffns = {name: r.ffn for name, r in routed.items()}
    stats = {name: RoutedStats(r.router, r.bias, r.moments.mean) for name, r in routed.items()}
    seen = widened(data, model_transform(model), 0, config.collages, config.seed)
    return measure_sensitivity(model, ffns, stats, seen, config.sensitivity_tokens, config.objective, config.seed, report, device)


def ffn_budget(total: int, ffn: int, target: float, saved: int = 0) -> float:
    """MACs left to the routed layers so that a model of `total` MACs, `ffn` of them in these layers, ends at the share `target`,
    when narrower attention has `saved` some already. Raises `OutOfReach` if nothing would be left.
    """
    budget = ffn - ((1 - target) * total - saved)
    if budget >= ffn:
        raise OutOfReach(
            f"--target-macs {target:g}: narrower attention alone leaves {1 - saved / total:.2f} of the MACs, so nothing is to "
            "be cut from the MLPs; give a smaller share, or a larger --attention-macs"
        )
    if budget <= 0:
        raise OutOfReach(
            f"--target-macs {target:g}: the routed MLPs hold {ffn / total:.0%} of the MACs, so the result stays above "
            f"{1 - (ffn + saved) / total:.2f}"
        )
    return budget
