"""`moee ablate`: the paper's tables and sweeps on one model, with a verdict on each published ordering."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from exporter.terminal.flags import (
    OK,
    add_class_map,
    add_device,
    add_outputs,
    add_weights,
    model_inputs,
    session_of,
    show_skipped,
)
from exporter.terminal.options import add_options
from exporter.terminal.space import add_scratch
from exporter.terminal.ui import ProgressDisplay
from moee.ablation.grid import AblationConfig
from moee.ablation.paper import NAME as PAPER
from moee.ablation.paper import TABLES as PAPER_TABLES
from moee.ablation.paper import lines
from moee.errors import UserError
from moee.places.output_folder import OutputFolder
from moee.schema import shown
from moee.store.result_kinds import ABLATION

SCALE = ("seeds", "tokens", "cluster_tokens", "components", "min_cluster_size", "statistics", "refit_tokens")  # options
TEXT = "the paper's ablation tables and sweeps, and whether their orderings hold here"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("ablate", help=TEXT, description=TEXT)
    sub.set_defaults(check=check, run=run, loads="moee.ablation.run")
    what = "paper: tables 2, 7, 8, fig6 and fig7, and what Tables 1 and 5 would take on ImageNet with a GPU (modelled)"
    sub.add_argument("what", nargs="?", metavar="{paper}", help=what)
    sub.add_argument("--model", default="vit-scratch", metavar="NAME", help="as in moee extract (vit-scratch)")
    text = "digits (default), photos, photo-crops, an image folder or timm.data's"
    sub.add_argument("--data", default="digits", help=text)
    add_weights(sub)
    add_class_map(sub)
    sub.add_argument("--tables", help="comma-separated tables and figures of the paper: 2, 3, 7, 8, 9, fig6, fig7 (all)")
    sub.add_argument("--compensation", help="comma-separated compensations: none, mean, refit (none,refit)")
    sub.add_argument("--keep", help="comma-separated kept shares that each row is run at (0.50,0.70,0.90)")
    add_options(sub.add_argument_group("the scale of every cell"), AblationConfig, SCALE)
    add_device(sub)
    add_scratch(sub)
    sub.add_argument("--out", required=True, help="folder; finished cells in it are not run again")
    sub.add_argument("--force", action="store_true", help="delete the ablation in the output folder first")
    add_outputs(sub, lambda args: [_output(args)])


def _output(args: argparse.Namespace) -> OutputFolder:
    return OutputFolder(args.out, ABLATION, args.force, model_inputs(args), grows=True)


def check(args: argparse.Namespace) -> None:
    """What can be said of the line alone. Raises `UserError`."""
    if args.what not in (None, PAPER):
        raise UserError(f"ablate {shown(args.what)}: expected {PAPER}, or nothing; a model goes with --model")
    if args.what is not None and args.tables is not None:
        raise UserError(f"ablate {PAPER} runs tables {', '.join(PAPER_TABLES)}; leave --tables out")


def _list(text: str | None, kind: type = str) -> tuple | None:
    if text is None:
        return None
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UserError(f"--keep {text!r}: expected numbers between 0 and 1, separated by commas") from error


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.plots.ablation import draw_ablation
    from moee.ablation.grid import make_ablation_config
    from moee.ablation.run import run_ablation
    from moee.ablation.summary import verdict_lines

    tables = PAPER_TABLES if args.what else _list(args.tables)
    ablation = make_ablation_config(
        tables=tables, compensation=_list(args.compensation), keeps=_list(args.keep, float),
        **{name: getattr(args, name) for name in SCALE},
    )  # fmt: skip
    with ProgressDisplay() as report:
        session = session_of(args, report, console)
        if args.force:  # only now that the input is known to be good
            _output(args).remove()
        summary = run_ablation(session, ablation, args.out, report)
        drawn = draw_ablation(summary, Path(args.out))
    for line in verdict_lines(summary["verdicts"]):
        console.print(line.replace("**", ""), highlight=False)
    show_skipped(console, summary["data_read"])
    if summary["no_accuracy"]:
        console.print(f"accuracy is not compared: {summary['no_accuracy']}", highlight=False)
    if args.what:
        for line in lines():
            console.print(line, highlight=False, soft_wrap=True)
    console.print(f"written to {args.out}: ablation.json, table.md, {len(drawn)} plots")
    return OK
