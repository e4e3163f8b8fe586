"""`moee plan`: which method wins on this model, data and device, under a budget."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from exporter.commands.models.elsewhere import add_elsewhere, emit, go_on, measurement_lines, result_of
from exporter.terminal.flags import (
    OK,
    add_device,
    add_model,
    add_out,
    add_outputs,
    add_trial,
    at_least,
    model_flags,
    model_inputs,
    session_of,
    show_skipped,
)
from exporter.terminal.idle import keep_defaults, refuse_idle
from exporter.terminal.options import add_options, given_options
from exporter.terminal.space import add_memory, add_scratch
from exporter.terminal.ui import FittingTable, ProgressDisplay, number, percent, span
from moee.config import MOST_BATCH, validated
from moee.errors import UserError
from moee.measure.accuracy import counted
from moee.methods.experts import ALLOCATIONS, USUAL, WIDTHS, ExpertsOptions
from moee.methods.heads.method import HeadsOptions
from moee.methods.registry import METHODS
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder, resume_folder
from moee.places.placement import Output
from moee.planning.budget import Budget
from moee.schema import data_title
from moee.store.result_kinds import EMIT, PLAN, PLAN_STATE
from plugins.devices import PROFILES, parse_sm

if TYPE_CHECKING:
    from exporter.targets.target import Target

BASE = (  # options that all points share
    "seed", "tokens", "cluster_tokens", "sensitivity_tokens", "neurons", "compensation", "refit_target", "refit_tokens",
    "collages", "attention_heads", "width_multiple",
)  # fmt: skip
BASE_OF = (ExpertsOptions, HeadsOptions)  # whose help says what they are
BESIDE = {"attention": "attention", "tokens": "merged to"}  # columns of what is done beside a method
TEXT = "try methods and budgets, print what wins and by how much over static pruning and dense"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("plan", help=TEXT, description=TEXT)
    sub.set_defaults(check=check, run=run, loads="exporter.targets.registry")
    add_model(sub)
    add_options(sub.add_argument_group("the budget, one of these or more"), Budget)
    where = "measured: cpu, cuda, tensorrt (this machine's), ssh:HOST, a RESULT.json; modelled, by a roofline:"
    sub.add_argument("--device", help=f"where the model will run. {where} {', '.join(PROFILES)}")
    sub.add_argument("--batch", type=at_least(1, MOST_BATCH), default=8, help="images of a batch that is timed (8)")
    typed = "type of the graphs that are measured: fp32, fp16 or bf16 (fp32); a board is modelled in fp16"
    sub.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", metavar="TYPE", help=typed)
    add_elsewhere(sub)
    add_device(sub, target=True)
    usual = ",".join(name for method in METHODS for name, variant in method.variants.items() if variant.usual)
    tried = ", ".join(name for method in METHODS for name in method.variants)
    named = f"comma-separated ways that are tried, of {tried}; all: every one (default: {usual})"
    sub.add_argument("--methods", metavar="NAMES", help=named)
    spent = f"comma-separated ways to spend a budget, of {', '.join(ALLOCATIONS)} (default: {','.join(USUAL)})"
    sub.add_argument("--allocations", metavar="NAMES", help=spent)
    sub.add_argument("--targets", metavar="SHARES", help="comma-separated shares of MACs to try (default: 0.8,0.7,0.6,0.5)")
    share = "comma-separated shares of the attention's MACs to try, heads narrowed to them; 1 leaves them (default: 1)"
    sub.add_argument("--attention-macs", metavar="SHARES", help=share)
    merged = "comma-separated shares of the MACs that merging tokens leaves before each method; 1 merges none (default: 1)"
    sub.add_argument("--token-macs", metavar="SHARES", help=merged)
    group = sub.add_argument_group("options of every method that has them")
    for kind in BASE_OF:
        add_options(group, kind, BASE, {"cluster_tokens": 6000, "width_multiple": WIDTHS})
    add_trial(sub)
    add_scratch(sub)
    add_memory(sub)
    add_out(sub, "plan.json")
    add_outputs(sub, _outputs)
    keep_defaults(sub)


def _outputs(args: argparse.Namespace) -> list[Output]:
    inputs = (*model_inputs(args), *source_paths(result_of(args)))
    emit = [] if args.emit is None else [OutputFolder(args.emit, EMIT, args.force, inputs, option="--emit")]
    return [OutputFolder(args.out, PLAN, args.force, inputs), resume_folder(args.out, PLAN_STATE, inputs), *emit]


def parse_shares(option: str, text: str | None, whole: bool = False) -> tuple[float, ...] | None:
    """`0.8,0.6` to shares, each once; 1 is one if `whole`. Raises `UserError` for anything else."""
    if text is None:
        return None
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} {text}: expected shares such as 0.8,0.6") from error
    if not all(0 < share < 1 or (whole and share == 1) for share in shares):
        raise UserError(f"{option} {text}: expected shares of the MACs between 0 and 1" + ", or 1" * whole)
    return tuple(dict.fromkeys(shares))


def named_in(text: str) -> tuple[str, ...]:
    """Names between commas, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def check(args: argparse.Namespace) -> None:
    """What can be said of the line alone."""
    parse_shares("--targets", args.targets)
    parse_shares("--attention-macs", args.attention_macs, whole=True)
    parse_shares("--token-macs", args.token_macs, whole=True)
    budget_of(args)
    if args.device is None and args.emit is None and args.measured is None:
        idle = "batch", "precision", "candidates", "sm"
        refuse_idle(args, "for a device that models are timed on, and --device names none", *idle)


def budget_of(args: argparse.Namespace) -> Budget:
    """What the line asks of the plan."""
    return validated(Budget, given_options(args, [Budget]))


def run(args: argparse.Namespace, console: Console) -> int:
    from moee.planning.plan import check_ways, make_plan
    from moee.planning.search import TARGETS, usual, variants

    targets = parse_shares("--targets", args.targets) or TARGETS
    attention = parse_shares("--attention-macs", args.attention_macs, whole=True) or (1.0,)
    merged = parse_shares("--token-macs", args.token_macs, whole=True) or (1.0,)
    budget = budget_of(args)
    methods = usual() if args.methods is None else tuple(variants()) if args.methods == "all" else named_in(args.methods)
    allocations = named_in(args.allocations) if args.allocations is not None else USUAL
    base = {name: value for name in BASE if (value := getattr(args, name)) is not None}
    check_ways(methods, allocations, attention, base, merged)
    if args.emit is not None and result_of(args) is not None:
        raise UserError("--emit begins a measurement and --measured ends it; give one of them")
    ways: dict[str, Any] = dict(methods=methods, targets=targets, base=base, allocations=allocations)
    ways |= {"attention": attention, "tokens": merged}
    if args.emit is not None:
        return emit(args, console, budget, ways)
    if result_of(args) is not None:
        return _show(args, console, go_on(args, console, budget, ways))
    target = _target(args)
    with ProgressDisplay() as report:
        session = session_of(args, report, console, "--torch-device")
        latency = target.timing(session, report) if target is not None else None
        if target is not None:
            console.print(f"device: {target.label}", highlight=False, soft_wrap=True)
        plan = make_plan(session, budget, args.out, latency=latency, force=args.force, report=report, **ways)
    return _show(args, console, plan)


def _target(args: argparse.Namespace) -> Target | None:
    """The target of `--device`, which can be measured or modelled; None without one. It is refused before a model is loaded."""
    from exporter.targets.registry import target_of

    if args.device is None:
        return None
    sm = None if args.sm is None else parse_sm(args.sm)
    target = target_of(args.device, batch=args.batch, precision=args.precision, most=args.candidates, sm=sm)
    target.check()
    return target


def _show(args: argparse.Namespace, console: Console, plan: dict[str, Any]) -> int:
    console.print(points_table(plan))
    for line in verdict(plan):
        console.print(line, soft_wrap=True)
    show_skipped(console, plan["data_read"])
    command = ["moee", "extract", args.model, "--data", args.data, *model_flags(args), "--plan", args.out, "--out", "DIR"]
    apply = f"; to apply it: {shlex.join(command)}" if plan["winner"]["recipe"] else ""
    console.print(f"written to {args.out}{apply}", soft_wrap=True, highlight=False)
    return OK


def points_table(plan: dict[str, Any]) -> Table:
    """All points by MACs; those on the Pareto front are marked, and the winner."""
    front = [p["recipe"] for p in plan["front"]]
    beside = [name for name in ("attention", "tokens") if any(_share(p, name) < 1 for p in plan["points"])]
    table = FittingTable(f"{plan['model']['name']} on {data_title(plan['data'])}")
    shares = [BESIDE[name] for name in beside]
    for column in ("", "method", "allocation", *shares, "MACs", "params", "cosine", "accuracy", "latency ms"):
        table.add_column(column, justify="left" if column in ("", "method", "allocation") else "right", no_wrap=True)
    for p in sorted(plan["points"], key=lambda p: p["macs"]):
        mark = "winner" if p["recipe"] == plan["winner"]["recipe"] else "front" if p["recipe"] in front else ""
        ms = p["latency"]
        timing = f"{ms['moee_ms']:.2f}, {ms['dense_ms'] / ms['moee_ms']:.2f}x\n({_kind(ms)})" if ms else ""
        table.add_row(
            mark, p["method"], p["allocation"], *[percent(_share(p, name)) for name in beside], percent(p["macs"]),
            percent(p["params"]), number(p["cosine"], 4), _accuracy(p), timing,
        )  # fmt: skip
    return table


def _kind(latency: dict[str, Any]) -> str:
    """How a latency is known, short enough for a table: the device's name stands below it."""
    kind: str = latency["kind"]
    if len(kind) <= len("measured on CPU"):
        return kind
    return "measured" if kind.startswith("measured") else "modelled, scaled"


def _share(point: dict[str, Any], name: str) -> float:
    """Share of the `attention`'s MACs that a point keeps, or of all MACs that merged `tokens` leave; older plans have none."""
    share: float = point.get(name, 1.0)
    return share


def _accuracy(point: dict[str, Any]) -> str:
    """A point's accuracy, and its 95 % interval on a line of its own."""
    interval = point.get("accuracy_interval")
    return percent(point["accuracy"]) + (f"\n{span(interval)}" if interval else "")


def _named(point: dict[str, Any]) -> str:
    """A point's way."""
    name = point["method"] + (f" ({point['allocation']})" if point["allocation"] else "")
    if _share(point, "attention") < 1:
        name += f" beside {percent(_share(point, 'attention'))} of the attention"
    if _share(point, "tokens") < 1:
        name += f" after merging tokens to {percent(_share(point, 'tokens'))} of the MACs"
    return name


def not_made(plan: dict[str, Any]) -> list[str]:
    """Sentences on what could not be made, one a way: at which targets, and why not at the first of them."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for failed in plan.get("not_made", []):
        ways.setdefault(_named(failed), []).append(failed)
    return [
        f"{name} could not be made at {', '.join(percent(f['target']) for f in failed)} of the MACs: "
        + failed[0]["why"].removeprefix(f"--target-macs {failed[0]['target']:g}: ").partition(";")[0]
        for name, failed in ways.items()
    ]


def verdict(plan: dict[str, Any]) -> list[str]:
    """The winner and its margins as sentences."""
    winner = plan["winner"]
    lines = [f"winner: {_named(winner)} at {percent(winner['macs'])} of the MACs, cosine {number(winner['cosine'], 4)}"]
    for point in plan.get("passed_over", []):
        ours, theirs = (each["latency"]["dense_ms"] / each["latency"]["moee_ms"] for each in (winner, point))
        lines.append(
            f"{_named(point)} was measured faster, {theirs:.2f}x beside {ours:.2f}x, which is within the noise; a more faithful "
            "model has no more MACs"
        )
    measured = plan.get("accuracy", {})
    if measured.get("no_accuracy"):
        lines.append(f"accuracy is not compared: {measured['no_accuracy']}")
    elif measured:
        of = counted(measured["labelled"], measured["images"], bool(measured.get("probe")))
        lines.append(f"accuracies are of {of}, with 95 % intervals")
    lines += measurement_lines(plan)
    for other, margin in plan["margins"].items():
        if margin is None:
            lines.append(f"no {other} model meets the budget")
            continue
        text = f"over {other}: {margin['macs'] * 100:+.1f} points of MACs saved, cosine {margin['cosine']:+.4f}"
        if margin["latency_ms"] is not None:
            text += f", {margin['latency_ms']:+.2f} ms saved"
        lines.append(text)
    return lines + not_made(plan)
