"""`moee compress`: from a model and images to the fastest model within a budget, with its bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from exporter.commands.models.plan import named_in, parse_shares
from exporter.terminal.flags import (
    OK,
    add_device,
    add_model,
    add_out,
    add_outputs,
    add_trial,
    at_least,
    model_inputs,
    session_of,
    speak,
)
from exporter.terminal.options import add_options, flag_of, given_options
from exporter.terminal.space import add_memory, add_scratch
from exporter.terminal.ui import ProgressDisplay
from moee.config import MOST_BATCH, validated
from moee.errors import UserError
from moee.places.inputs import source_paths
from moee.places.staged_folder import StagedFolder
from moee.planning.budget import Budget
from moee.schema import shown
from plugins.devices import HOW

TEXT = "the fastest model within a budget, by measurement: plan, extract, tune, export, verify, bench, bundle, report"
DEFAULT = "20m"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("compress", help=TEXT, description=TEXT)
    sub.set_defaults(check=check, run=run, loads="exporter.compression.job")
    add_model(sub)
    add_options(sub.add_argument_group("the budget (default: at most 1 point of accuracy, or a cosine of 0.98)"), Budget)
    where = "where models are timed, as in moee plan: cpu, cuda, tensorrt, ssh:HOST, or a board (modelled) (cpu)"
    sub.add_argument("--device", default="cpu", help=where)
    sub.add_argument("--sm", metavar="GPU", help=f"the device of the bundle: {HOW}; or cpu (that of --device)")
    sub.add_argument("--batch", type=at_least(1, MOST_BATCH), default=8, help="images of a batch that is timed (8)")
    when = f"how long it may take, such as 15m, 900s or 2h; none for no limit ({DEFAULT})"
    sub.add_argument("--time", type=time_of, default=DEFAULT, metavar="T", help=when)
    tried = "comma-separated ways that are tried, as in moee plan; all: every one (static,tokens,kmeans-4)"
    sub.add_argument("--methods", metavar="NAMES", help=tried)
    share = "comma-separated shares of the attention's MACs that are tried, heads narrowed to them (1,0.75)"
    sub.add_argument("--attention-macs", metavar="SHARES", help=share)
    merged = "comma-separated shares of the MACs that merging tokens leaves before each method; 1 merges none (default: 1)"
    sub.add_argument("--token-macs", metavar="SHARES", help=merged)
    more = "further labelled images, on which the result is measured once it is chosen"
    sub.add_argument("--confirm", metavar="DATA", help=more)
    add_device(sub, target=True)
    add_trial(sub)
    add_scratch(sub)
    add_memory(sub)
    add_out(sub, "all stages; an unfinished one is gone on from")
    add_outputs(sub, lambda args: [StagedFolder(args.out, force=args.force, inputs=_inputs(args))])


def _inputs(args: argparse.Namespace) -> tuple[Path, ...]:
    return (*model_inputs(args), *source_paths(args.confirm))


def time_of(text: str) -> float | None:
    """A type for argparse: `15m`, `900s`, `900`, `2h`, `none`; in seconds."""
    from exporter.compression.clock import LEAST_S, MOST_S, seconds_of

    if text == "none":
        return None
    try:
        seconds = seconds_of(text)
    except ValueError:
        seconds = 0.0
    if not LEAST_S <= seconds <= MOST_S:
        came = shown(text, limit=40)
        raise argparse.ArgumentTypeError(f"expected a time such as 15m, 900s or 2h, from 1m to 168h, or none; came {came}")
    return seconds


def check(args: argparse.Namespace) -> None:
    """What can be said of the line alone."""
    parse_shares("--attention-macs", args.attention_macs, whole=True)
    parse_shares("--token-macs", args.token_macs, whole=True)
    budget_of(args)


def budget_of(args: argparse.Namespace) -> Budget | None:
    """What the line asks of the result; None where it leaves that open. Raises `UserError`."""
    values = given_options(args, [Budget])
    budget = validated(Budget, values) if values else None
    if budget is not None and not budget.limits_quality and budget.target_latency_ms is None:
        alone = " and ".join(map(flag_of, values))
        raise UserError(f"{alone} alone: compress looks for speed within a quality, or quality within a time; give --max-drop, "
                        "--min-cosine or --target-latency-ms too")  # fmt: skip
    return budget


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.compression.job import Job
    from exporter.compression.request import ALLOCATION, HEADS, METHODS, Request, every_method, target_sm
    from exporter.targets.registry import target_of
    from moee.planning.plan import check_ways

    budget = budget_of(args)
    sm = target_sm(args.device, args.sm)
    target_of(args.device, batch=args.batch, sm=sm).check()  # before a model is loaded
    methods = METHODS if args.methods is None else every_method() if args.methods == "all" else named_in(args.methods)
    heads = parse_shares("--attention-macs", args.attention_macs, whole=True) or HEADS
    tokens = parse_shares("--token-macs", args.token_macs, whole=True) or (1.0,)
    check_ways(methods, ALLOCATION, heads, {}, tokens)
    request = Request(
        budget, args.device, sm=sm, batch=args.batch, time_s=args.time, methods=methods, heads=heads, tokens=tokens,
        confirm=args.confirm,
    )  # fmt: skip
    with ProgressDisplay() as report:
        session = session_of(args, report, console, "--torch-device")
        place = StagedFolder(args.out, force=args.force, inputs=_inputs(args))
        result = Job(session, place, request, report, speak(console), word=args_word(args, session)).run()
    for line in result.lines:
        console.print(line, highlight=False, soft_wrap=True)
    return OK


def args_word(args: argparse.Namespace, session: Any) -> str | None:
    """The user's function that the model comes from, which the line names."""
    return args.model if session.spec.library == "python" else None
