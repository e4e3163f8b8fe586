"""`moee ablate-clear`: CLEAR-MoE over routers, ranks, experts, calibration sizes and seeds; resumable."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from exporter.terminal.flags import (
    OK,
    add_device,
    add_model,
    add_outputs,
    at_least,
    model_inputs,
    session_of,
    several,
    show_skipped,
)
from exporter.terminal.space import add_scratch
from exporter.terminal.ui import ProgressDisplay
from moee.config import MOST_SEEDS
from moee.places.output_file import OutputFile
from moee.places.output_folder import OutputFolder
from moee.store.result_kinds import CLEAR_ABLATION, CLEAR_PLOT, CLEAR_TABLE

TEXT = "CLEAR-MoE over routers, ranks, experts, calibration sizes and seeds; resumable"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("ablate-clear", help=TEXT, description=TEXT)
    sub.set_defaults(run=run, loads="exporter.clear_ablation")
    add_model(sub)
    sub.add_argument("--design", default="star", help="star (one factor at a time) or full (every combination)")
    sub.add_argument("--routers", type=several(str), help="comma-separated routers (random,linear,mlp,centroid)")
    ranks = "comma-separated ranks, shared and residual together (96,128,176)"
    sub.add_argument("--ranks", type=several(at_least(1)), help=ranks)
    sub.add_argument("--experts", type=several(at_least(1)), help="comma-separated numbers of experts (2,4,8)")
    images = "comma-separated numbers of calibration images (50,200,500)"
    sub.add_argument("--calibration-images", type=several(at_least(1)), help=images)
    sub.add_argument("--residual-rank", type=at_least(0), default=16, help="part of the rank that each expert has alone (16)")
    sub.add_argument("--seeds", type=at_least(1, MOST_SEEDS), default=3, help="runs of a cell, with seeds 0, 1, ... (3)")
    add_device(sub)
    add_scratch(sub)
    sub.add_argument("--out", required=True, help="folder of the cells; what it holds is not computed again")
    table = "write the Markdown table here, and beside it a plot as SVG if matplotlib is installed"
    sub.add_argument("--table", metavar="FILE", help=table)
    force = "replace existing files of another kind where --table writes; cells are kept"
    sub.add_argument("--force", action="store_true", help=force)
    add_outputs(sub, lambda args: [_folder(args), *_table(args)])


def _folder(args: argparse.Namespace) -> OutputFolder:
    return OutputFolder(args.out, CLEAR_ABLATION, inputs=model_inputs(args), grows=True)


def _table(args: argparse.Namespace) -> list[OutputFile]:
    """The table and the plot beside it; nothing without --table."""
    if args.table is None:
        return []
    common = {"force": args.force, "inputs": model_inputs(args), "option": "--table"}
    table = OutputFile(args.table, CLEAR_TABLE, **common)
    if Path(args.table).name in ("", ".."):  # refused
        return [table]
    return [table, OutputFile(Path(args.table).with_suffix(".svg"), CLEAR_PLOT, **common)]


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.clear_ablation import Grid, ablate, markdown, plot, summarise

    given = {"router": args.routers, "rank": args.ranks, "experts": args.experts, "calibration_images": args.calibration_images}
    given = {name: values for name, values in given.items() if values}
    defaults = dict(Grid().centre)
    centre = tuple((n, v if n not in given or v in given[n] else given[n][len(given[n]) // 2]) for n, v in defaults.items())
    grid = Grid(**given, seeds=args.seeds, residual_rank=args.residual_rank, centre=centre)
    grid.check(args.design)  # before the model is read
    with ProgressDisplay() as report:
        session = session_of(args, report, console)
        cells = ablate(session, grid, args.design, args.out, report)
    rows = summarise(cells)
    text = markdown(rows)
    console.print(text)
    show_skipped(console, session.data_facts())
    if args.table is not None:
        table, picture = _table(args)
        table.write_text(text)
        console.print(f"table written to {args.table}" + (f", plot to {picture.path}" if plot(rows, grid, picture) else ""))
    return OK
