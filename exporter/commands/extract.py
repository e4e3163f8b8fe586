"""`moee extract`: find experts in a dense model's MLPs."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from exporter.commands import (
    OK,
    add_attention,
    add_device,
    add_model,
    add_out,
    add_outputs,
    add_ranks,
    add_trial,
    at_least,
    check_outputs,
    classes_of,
    model_inputs,
    model_of,
    rank_display,
    show_skipped,
    trial_of,
)
from exporter.ui import attention_table, data_title, layer_notes, layer_table, number, percent, stage_table
from moee.bounds import JOBS
from moee.config import DEFAULT_PRESET, PRESETS
from moee.errors import UserError
from moee.places.placement import OutputFolder, source_paths
from moee.store.result_kinds import MODEL

TEXT = "find experts in a dense model's MLPs"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("extract", help=TEXT, description=TEXT)
    sub.set_defaults(run=run)
    add_model(sub)
    sub.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (compensated)")
    sub.add_argument("--exclude", action="append", default=[], metavar="LAYER", help="leave this MLP or block dense; repeatable")
    sub.add_argument("--seed", type=int)
    sub.add_argument("--tokens", type=int, help="calibration tokens a layer (126080)")
    sub.add_argument("--clustering", help="hdbscan, dbscan, optics, kmeans, birch, random or none (one expert)")
    sub.add_argument("--clusters", type=int, help="number of clusters; k-means if --clustering does not say otherwise")
    sub.add_argument("--components", type=int, help="principal components before clustering (all features)")
    sub.add_argument("--cluster-tokens", type=int, help="of these, how many are clustered (all)")
    sub.add_argument("--min-cluster-size", type=float, help="share of the clustered tokens (0.006)")
    sub.add_argument("--min-samples", type=int)
    sub.add_argument("--criterion", help="output_variance, sensitivity, variance, magnitude or random")
    sub.add_argument("--keep", type=float, help="share of the criterion that is kept (0.95)")
    sub.add_argument("--target-macs", type=float, help="find the kept share or ranks that leave this share of the dense MACs")
    sub.add_argument("--allocation", help="expert (each keeps its share) or model (one threshold; criterion sensitivity)")
    sub.add_argument("--objective", help="what the sensitivity is of: output, tokens or both (both)")
    sub.add_argument("--plan", metavar="PLAN", help="plan.json of moee plan: its winner; takes no other option of the method")
    sub.add_argument("--statistics", help="cluster or routed")
    sub.add_argument("--compensation", help="none, mean or refit")
    sub.add_argument("--routing", help="cosine, euclidean, hash or random")
    sub.add_argument("--router", help="linear, mlp, centroid or random, clear-moe only")
    sub.add_argument("--rank", type=int, help="of the shared basis of both maps, clear-moe only")
    sub.add_argument("--residual-rank", type=int, help="of each expert, clear-moe only (divided by least error)")
    sub.add_argument("--energy", type=float, help="kept share of each map's output variance, clear-moe only (0.98)")
    sub.add_argument("--layers", type=int, help="how many layers, best scores first, clear-moe only (all that pay)")
    sub.add_argument("--calibration-images", type=int, help="clear-moe only (200)")
    sub.add_argument("--eps", type=float, help="radius, dbscan only")
    sub.add_argument("--method", help="moee; moefication: disjoint experts, top-k a token; clear-moe: low-rank experts")
    sub.add_argument("--experts", type=int, help="experts a layer, moefication and clear-moe only")
    sub.add_argument("--top-k", type=int, help="experts a token, moefication only")
    sub.add_argument("--split", help="weights (clusters of fc1's rows) or coactivation, moefication only")
    sub.add_argument("--selector", help="centre (parameter centre) or router (trained), moefication only")
    sub.add_argument("--refit-lambda", type=float, help="ridge, as a share of the Gram matrix's mean diagonal (held-out choice)")
    sub.add_argument("--refit-tokens", type=int, help="tokens a layer that the refit may use (126080)")
    sub.add_argument("--augment", type=int, metavar="N", help="random views of each training image for the refit beside it (0)")
    sub.add_argument("--collages", type=int, metavar="N", help="collages a training image for calibration and refit (0)")
    add_attention(sub)
    side = "layers clustered side by side (1); each takes memory of its own"
    sub.add_argument("--jobs", type=at_least(*JOBS), default=1, help=side)
    add_device(sub)
    add_trial(sub)
    add_ranks(sub)
    add_out(sub, "the extracted model")
    add_outputs(sub, lambda args: [OutputFolder(args.out, MODEL, args.force, (*model_inputs(args), *source_paths(args.plan)))])


def run(args: argparse.Namespace, console: Console) -> int:
    from moee.config import MethodOptions, make_extract_config
    from moee.data.sources import same_data
    from moee.parallel.joining import joined
    from moee.planning import planned_on, read_plan
    from moee.stages.extract import run_extract

    names = (
        "seed", "tokens", "clustering", "components", "cluster_tokens", "min_cluster_size", "min_samples", "clusters",
        "criterion", "keep", "statistics", "compensation", "routing", "eps", "refit_lambda", "refit_tokens",
        "method", "experts", "top_k", "split", "selector", "target_macs", "allocation", "objective",
        "augment", "collages", "attention_macs", "attention_heads",
    )  # fmt: skip
    overrides = {name: getattr(args, name) for name in names}
    if args.clusters is not None and args.clustering is None:
        overrides["clustering"] = "kmeans"
    if args.plan:
        taken = [name for name, value in {"preset": args.preset, **overrides}.items() if value is not None]
        taken += [name for name in ONLY_CLEAR if getattr(args, name) is not None]
        if taken or args.exclude:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in taken)
            raise UserError(f"--plan decides the method; leave {given or '--exclude'} out")
    config: MethodOptions
    if args.method == "clear-moe":
        if args.preset is not None:
            raise UserError("--preset is not for --method clear-moe; leave it out")
        config = clear_config(args)
    else:
        foreign = [name for name in ONLY_CLEAR if getattr(args, name) is not None]
        if foreign:
            raise UserError(f"--{foreign[0].replace('_', '-')} is for --method clear-moe; leave it out or add that method")
        config = make_extract_config(args.preset or DEFAULT_PRESET, exclude=tuple(args.exclude) or None, **overrides)
    classes = classes_of(args)
    with joined(args.rank_timeout, args.threads, args.torch_device) as group, rank_display(group) as report:
        with group.agreed():
            if group.leader:
                check_outputs(args)
        spec = _shared_spec(args, report, group, console)
        if args.plan:
            with group.agreed():
                config = read_plan(args.plan, spec)
            planned = planned_on(args.plan)
            if not same_data(args.data, planned):
                made = data_title(planned) or "data that it does not name"
                console.print(f"the plan was made on {made}, and on {args.data} another method may win", highlight=False)
        moee = run_extract(
            spec, args.data, config, args.out, args.force, report, None, args.jobs, group, args.workers, classes, trial_of(args)
        )  # fmt: skip
    if not group.leader:
        return OK
    if any("ranks" in layer for layer in moee.info["layers"]):
        console.print(clear_table(moee.info["layers"]))
    console.print(layer_table(moee.info["layers"]))
    for note in layer_notes(moee.info["layers"]):
        console.print(note, highlight=False)
    if "attention" in moee.info:
        console.print(attention_table(moee.info["attention"]))
    what = args.method if args.method == "clear-moe" else f"preset {args.preset or DEFAULT_PRESET}"
    if args.plan:
        what = "as planned"
    console.print(stage_table(moee.info, f"{spec.name} on {args.data}, {what}"))
    show_skipped(console, moee.info["data_read"])
    console.print(f"written to {args.out}; peak memory {moee.info['peak_memory_bytes'] / 2**30:.2f} GiB")
    return OK


def _shared_spec(args: argparse.Namespace, report: Any, group: Any, console: Console) -> Any:
    """The model's spec on every rank; rank 0 goes first, so that what has to be fetched is fetched once."""
    spec = None
    for turn in (group.leader, not group.leader):
        with group.agreed():
            if turn:
                spec = model_of(args, report, console)
    return spec


ONLY_CLEAR = ("router", "rank", "residual_rank", "energy", "layers", "calibration_images")
CLEAR_SHARED = (  # flags that clear-moe has in common with moee
    "seed", "experts", "tokens", "refit_lambda", "target_macs", "attention_macs", "attention_heads",
)  # fmt: skip


def clear_config(args: argparse.Namespace) -> Any:
    """The configuration of CLEAR-MoE; flags of the other methods are refused rather than ignored."""
    from moee.config import validated
    from moee.methods.clear_moe import ClearConfig

    foreign = (
        "clustering", "components", "cluster_tokens", "min_cluster_size", "min_samples", "clusters", "criterion", "keep",
        "statistics", "routing", "eps", "refit_tokens", "top_k", "split", "selector", "allocation", "objective",
        "augment", "collages",
    )  # fmt: skip
    given = [name for name in foreign if getattr(args, name) is not None]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} is not for --method clear-moe; leave it out")
    if args.compensation not in (None, "mean", "refit"):
        raise UserError(f"--compensation {args.compensation}: clear-moe takes mean or refit")
    values = {name: getattr(args, name) for name in (*ONLY_CLEAR, *CLEAR_SHARED) if getattr(args, name) is not None}
    return validated(ClearConfig, {**values, "exclude": tuple(args.exclude), "refit": args.compensation != "mean"})


def clear_table(layers: list[dict[str, Any]]) -> Table:
    """Scores, ranks and router accuracy of every layer."""
    table = Table(min_width=76, title="scores and ranks")
    for column in ("layer", "near zero", "silhouette", "sensitivity", "score", "up", "down", "router"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer in layers:
        score, ranks = layer["scores"] or {}, layer["ranks"]
        table.add_row(
            layer["name"], percent(score.get("sparsity")), number(score.get("silhouette"), 3),
            number(score.get("sensitivity")), number(score.get("score"), 2),
            f"{ranks[0]}+{ranks[1]}" if ranks else "dense", f"{ranks[2]}+{ranks[3]}" if ranks else "dense",
            percent(layer["router_accuracy"]),
        )  # fmt: skip
    return table
