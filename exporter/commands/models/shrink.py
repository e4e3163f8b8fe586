"""`moee shrink`: merge the experts of a model that exists, or drop those that a domain does not need."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from exporter.terminal.advice import after_shrink
from exporter.terminal.flags import OK, add_device, add_moved, add_out, add_outputs, show_skipped
from exporter.terminal.options import add_options, given_options
from exporter.terminal.space import add_memory, add_scratch
from exporter.terminal.ui import FittingTable, ProgressDisplay, number, stage_table, title_of
from moee.config import validated
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder
from moee.places.placement import Output
from moee.shrinking.options import ShrinkConfig
from moee.store.result_kinds import MODEL

TEXT = "make the experts of an extracted or tuned model fewer: merge those that are alike, drop what a domain does not need"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("shrink", help=TEXT, description=TEXT)
    sub.set_defaults(run=run, loads="moee.stages.shrink")
    sub.add_argument("path", help="folder that moee extract or finetune wrote")
    sub.add_argument("--data", help="images to measure on; any will do (default: what it was last made on)")
    add_options(sub.add_argument_group("what is done"), ShrinkConfig)
    add_moved(sub)
    add_device(sub)
    add_scratch(sub)
    add_memory(sub)
    add_out(sub, "the smaller model")
    add_outputs(sub, _outputs)


def _outputs(args: argparse.Namespace) -> list[Output]:
    return [OutputFolder(args.out, MODEL, args.force, source_paths(args.path, args.data, args.checkpoint))]


def run(args: argparse.Namespace, console: Console) -> int:
    from moee.parallel.joining import alone
    from moee.stages.shrink import run_shrink

    config = validated(ShrinkConfig, given_options(args, [ShrinkConfig]))
    with ProgressDisplay() as report:
        moee = run_shrink(
            args.path, config, args.out, source=args.data, force=args.force, report=report, weights=args.checkpoint,
            model=args.word, group=alone(args.torch_device), memory=args.memory,
        )  # fmt: skip
    console.print(_table(moee.info["stages"]["shrunk"]["layers"]))
    console.print(stage_table(moee.info, title_of(moee.info, moee.spec.name, moee.data)))
    show_skipped(console, moee.info["data_read"])
    console.print(f"written to {args.out}", highlight=False, markup=False)
    words = ["--model", args.word] if args.word is not None else []
    console.print(after_shrink(moee.info, args.out, words), highlight=False, markup=False, soft_wrap=True)
    return OK


def _table(layers: list[dict[str, Any]]) -> Any:
    """What was done to each layer: experts before and after, neurons stored, and what the merges missed before and after the
    refit, as shares of the outputs' squares."""
    table = FittingTable("experts made fewer")
    for column in ("layer", "experts", "stored neurons", "dropped", "their share", "missed, merged", "refitted", "protected"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer in layers:
        refit = layer["refit"] or {}
        table.add_row(
            layer["name"], "{} to {}".format(*layer["experts"]), "{} to {}".format(*layer["stored"]),
            str(len(layer["dropped"])) if layer["dropped"] else "–", number(layer["given_up"]) if layer["dropped"] else "–",
            number(layer["losses"][-1] if layer["losses"] else None), number(refit.get("error_after")),
            ", ".join(map(str, layer["protected"])) or "–",
        )  # fmt: skip
    return table
