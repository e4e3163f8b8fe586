"""What methods that make each layer by itself share: calibrate, find each layer's experts, install them, refit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from moee.calibrate.calibration import LayerTokens, collect_tokens, gather_tokens
from moee.calibrate.elimination import Elimination
from moee.calibrate.grouping import GroupedLayer
from moee.calibrate.options import MEASURED, CalibrationOptions, NeuronOptions, SelectionOptions
from moee.calibrate.refit import refit
from moee.calibrate.sensitivity import RoutedStats, Sensitivity, measure_sensitivity
from moee.cures import cures
from moee.data.image_set import ImageSet, refuse_all_skipped
from moee.data.transform import model_transform
from moee.data.validation import fitted_part
from moee.data.views import widened
from moee.errors import NothingRouted, StepFailed
from moee.layers.report import LayerReport
from moee.layers.routed import NeuronLayer, RoutedFFN
from moee.methods.context import Context
from moee.methods.exchange import Finding, pack_finding, share_layers, unpack_finding
from moee.methods.neurons.assembly import build_layer, chosen_anew
from moee.methods.neurons.choice import choose_neurons
from moee.methods.neurons.gated_pruning import prune_gated
from moee.mlps.find import find_ffns, reports_of
from moee.mlps.sites import put_mlp
from moee.models.ffn import FFN
from moee.parallel.devices import computing_on
from moee.parallel.group import Group, Parcel
from moee.progress import Reporter
from moee.space.machine import give_back
from moee.store.scratch import temporary_folder
from moee.tokens.block import merging_blocks

MERGED = "refitted to the dense MLP's output, since merged tokens are others in the dense model"


def measured_by(options: NeuronOptions) -> str:
    """The criterion of gradients that is measured for the options: theirs, or else the one that an elimination's metric comes
    with."""
    return options.criterion if options.criterion in MEASURED else MEASURED[0]


@dataclass(frozen=True)
class Prepared:
    """An extraction up to the choice of neurons: the grouped layers, reports of what is no MLP to cut and, for the criteria of
    gradients or an elimination, what was `measured`, by the criterion and by the MLP's name. Different budgets can be applied to
    it."""

    ffns: list[FFN]
    layers: list[Finding]
    dense: list[LayerReport] = field(default_factory=list)
    measured: dict[str, dict[str, Sensitivity]] = field(default_factory=dict)

    def error(self, options: NeuronOptions) -> dict[str, Tensor]:
        """The error [K, H] that dropping each neuron of each expert makes; empty where the criterion is not of gradients."""
        return {name: found.error for name, found in self.measured.get(options.criterion, {}).items()}

    def metric(self, options: NeuronOptions) -> dict[str, Tensor]:
        """The metric [D, D] of errors of each MLP's output."""
        return {name: found.metric for name, found in self.measured[measured_by(options)].items()}

    @property
    def routed(self) -> dict[str, GroupedLayer]:
        return {r.ffn.name: r for r in self.layers if isinstance(r, GroupedLayer)}


class FindsExperts(Protocol):
    """What is asked here of a method; `moee.methods.layerwise.LayerMethod` says what each does."""

    gated: ClassVar[bool]

    def find(self, ffn: FFN, sampled: LayerTokens, options: Any, report: Reporter, device: torch.device) -> Finding: ...

    def announce(self, counts: Sequence[int], options: Any) -> None: ...

    def prepare(self, model: nn.Module, options: Any, context: Context) -> Prepared: ...

    def apply(self, model: nn.Module, prepared: Prepared, options: Any, context: Context) -> Sequence[LayerReport]: ...


def convert_layers(method: FindsExperts, model: nn.Module, options: Any, context: Context) -> list[LayerReport]:
    """Replace the MLPs of `model` in place by experts; returns one report a layer.

    Calibration tokens lie on disk while it runs. Deterministic for the same options, images and thread count. Cluster labels
    are cached, so an interrupted run does not cluster a finished layer again. In a group the ranks share the images of the
    calibration, the layers, and the images of sensitivity and refit; rank 0 chooses the neurons, and every rank gets its layers
    (the reports are rank 0's alone). Raises `UserError` for input that it cannot work with; the model is then unchanged.
    """
    return list(method.apply(model, method.prepare(model, options, context), options, context))


def group_layers(method: FindsExperts, model: nn.Module, options: Any, context: Context) -> Prepared:
    """Calibrate and find each layer's groups or experts, the layers divided over the ranks. Raises `StepFailed` where ranks
    differ in the MLPs that they find."""
    group, report = context.group, context.report
    with group.agreed():
        mlps = find_ffns(model, options.exclude, gated=method.gated)
    names = [ffn.name for ffn in mlps.ffns]
    if any(theirs != names for theirs in group.all_json(names)):  # they are proved by running them, on machines of many kinds
        raise StepFailed("the ranks do not find the same MLPs in the model; start them on machines of one kind")
    ffns, layers = mlps.ffns, []
    with temporary_folder(context.scratch) as folder:
        sampled = context.sampled
        if sampled:  # perhaps of more layers than this method cuts
            by_name = {tokens.name: tokens for tokens in sampled}
            sampled = [by_name[name] for name in names]
        else:
            sampled = calibrate(model, ffns, Path(folder), options, context)
            give_back()
        pairs = zip(ffns, sampled if group.alone else gather_tokens(list(sampled), group), strict=True)
        share = [(ffn, tokens) for ffn, tokens in pairs if tokens is not None]
        if group.leader:
            method.announce([tokens.count for _, tokens in share], options)
        threads = torch.get_num_threads()
        with group.agreed(), computing_on(group.device):
            report("MLPs analysed", 0, len(share))
            pool = ThreadPoolExecutor(max(1, context.limits.side_by_side(context.jobs)))
            try:
                for layer in pool.map(lambda pair: method.find(pair[0], pair[1], options, report, group.device), share):
                    layers.append(layer)
                    report("MLPs analysed", len(layers), len(share))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # an interrupt need not wait for a clustering
        torch.set_num_threads(threads)  # fits that run side by side each set and restore it, in any order
    give_back()
    return Prepared(ffns, layers if group.alone else _collected(ffns, layers, group), reports_of(mlps))


def calibrate(
    model: nn.Module, ffns: list[FFN], folder: Path, options: CalibrationOptions, context: Context
) -> list[LayerTokens]:
    """Tokens of the context's images and of the collages that the options ask for; its `data.skipped` keeps what is
    unreadable."""
    data, group = context.data, context.group
    seen = widened(data, model_transform(model), 0, options.collages, options.seed)
    sampled = collect_tokens(
        model, ffns, seen, folder, options.tokens, seed=options.seed, report=context.report, group=group, limits=context.limits
    )
    data.skipped.update({index: what for index, what in seen.skipped.items() if index < len(data)})
    with group.agreed():
        refuse_all_skipped(data)
    return sampled


def _collected(ffns: list[FFN], layers: list[Finding], group: Group) -> list[Finding]:
    """All layers' findings on rank 0; layer i was rank i mod the world size's."""
    collected, waiting = [], iter(layers)
    for position, ffn in enumerate(ffns):
        owner = position % group.world
        if group.rank == owner:
            layer = next(waiting)
            collected.append(layer)
            if not group.leader:
                group.send(pack_finding(layer), 0)
        elif group.leader:
            collected.append(unpack_finding(group.receive(owner), ffn))
    return collected


def install_experts(model: nn.Module, prepared: Prepared, options: Any, context: Context) -> list[LayerReport]:
    """Choose the neurons, replace the MLPs of `model` (which `prepared` was made from), refit on the group's devices. All ranks
    call it, and get their layers; the reports are whole on rank 0 alone."""
    group, reports = context.group, []
    stream, merged = options.compensation == "refit" and options.refit_target == "stream", bool(merging_blocks(model))
    dense = (context.dense or copy.deepcopy(model)) if stream and not merged else None
    with group.agreed():
        if group.leader:
            reports = _put_layers(model, prepared, options, context.data)
    share_layers(model, group)
    give_back()
    if options.compensation == "refit":
        seen = widened(fitted_part(context.data), model_transform(model), options.augment, options.collages, options.seed)
        ffns = {f.name: f for f in prepared.ffns}
        layers = {name: layer for name in ffns if isinstance(layer := model.get_submodule(name), NeuronLayer)}
        done = refit(
            model, layers, ffns, seen, options.refit_tokens, ridge=options.refit_lambda, report=context.report, group=group,
            elimination=Elimination(chosen_anew, prepared.metric(options)) if _eliminates(options) else None,
            dense=dense, limits=context.limits,
        )  # fmt: skip
        give_back()
        if stream and merged:
            done = {name: replace(r, note="; ".join(filter(None, [r.note, MERGED]))) for name, r in done.items()}
        reports = [replace(r, refit=done[r.name], union=layers[r.name].union) if r.name in done else r for r in reports]
    return [*reports, *prepared.dense]


def _eliminates(options: Any) -> bool:
    """Whether the refit chooses the neurons anew; methods that choose them in a way of their own have no such option."""
    return isinstance(options, SelectionOptions) and options.neurons == "eliminated"


def _put_layers(model: nn.Module, prepared: Prepared, options: Any, data: ImageSet) -> list[LayerReport]:
    """Put the layers that the choice of neurons makes into `model`; a report for each MLP that was looked at."""
    kept = choose_neurons(model, prepared.routed, prepared.error(options), data, options) if prepared.routed else {}
    reports: list[LayerReport] = []
    layers: dict[str, NeuronLayer] = {}
    for ffn, finding in zip(prepared.ffns, prepared.layers, strict=True):
        layer: NeuronLayer | None = None
        if isinstance(finding, GroupedLayer):
            build = prune_gated if ffn.gated else build_layer
            layer, layer_report = build(finding, kept.get(ffn.name), options.compensation)
        elif isinstance(finding, tuple):
            experts, layer_report = finding
            layer = RoutedFFN(experts, ffn.channels_first)
        else:
            layer_report = finding
        if layer is not None:
            layers[ffn.name] = layer
        reports.append(layer_report)
    if not layers:
        if prepared.routed:
            lower = cures("lower --target-macs", "lower --keep")
            raise NothingRouted(f"experts would cost as much as the dense MLPs in every layer; {lower}")
        raise NothingRouted(
            f"no layer showed two clusters, so the model would stay dense; {cures('add images', 'lower --min-cluster-size')}"
        )
    parts = {ffn.name: ffn.bypassed for ffn in prepared.ffns}
    for name, layer in layers.items():
        put_mlp(model, name, layer, parts[name])
    return reports


def sensitivity_of(model: nn.Module, prepared: Prepared, options: NeuronOptions, context: Context) -> dict[str, Sensitivity]:
    """Sensitivity of every routed layer's experts and neurons, measured on the group's devices. All ranks call it and get the
    same; what is routed, rank 0 knows."""
    stats = _shared_stats(prepared.routed, context.group)
    if options.criterion in ("taylor", "atomic"):  # nothing is put in a dropped neuron's place
        stats = {name: replace(each, mean=torch.zeros_like(each.mean)) for name, each in stats.items()}
    if not stats:
        return {}
    ffns = {ffn.name: ffn for ffn in prepared.ffns if ffn.name in stats}
    seen = widened(context.data, model_transform(model), 0, options.collages, options.seed)
    return measure_sensitivity(
        model, ffns, stats, seen, options.sensitivity_tokens, objective=options.objective,
        factored=options.criterion == "atomic", seed=options.seed,
        report=context.report, group=context.group, limits=context.limits,
    )  # fmt: skip


def _shared_stats(routed: dict[str, GroupedLayer], group: Group) -> dict[str, RoutedStats]:
    """Routers and means of rank 0's routed layers, by name."""
    own = {name: RoutedStats(r.router, r.bias, r.moments.mean) for name, r in routed.items()} if group.leader else {}
    tensors = {f"{name} {field}": value for name, stats in own.items() for field, value in vars(stats).items()}
    parcel = group.broadcast(Parcel(list(own), tensors))
    return {name: RoutedStats(*(parcel.tensors[f"{name} {f}"] for f in ("router", "bias", "mean"))) for name in parcel.body}
