"""`moee plots`: routing, similarity, neuron curves and patches of an extracted model, or the front of a plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from exporter.terminal.flags import OK, add_moved, add_out, add_outputs, at_least, open_artifact
from exporter.terminal.idle import keep_defaults, refuse_idle
from exporter.terminal.ui import ProgressDisplay
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder
from moee.store.result_kinds import FRONT, PLAN, PLOTS, kind_of

TEXT = "routing, similarity of experts, neuron curves and patches of an extracted model, or the front of a plan, as SVG and JSON"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("plots", help=TEXT, description=TEXT)
    sub.set_defaults(run=run, loads="exporter.plots")
    sub.add_argument("path", help="folder that extract, finetune or plan wrote")
    sub.add_argument("--data", help="images to run on (default: what the model was tuned on, else extracted on)")
    sub.add_argument("--images", type=at_least(1), default=256, help="held-out images that are routed and compared (256)")
    add_moved(sub)
    add_out(sub, "the plots")
    add_outputs(sub, _outputs)
    keep_defaults(sub)


def _is_plan(args: argparse.Namespace) -> bool:
    return kind_of(Path(args.path)) == PLAN


def _outputs(args: argparse.Namespace) -> list[OutputFolder]:
    kind = FRONT if _is_plan(args) else PLOTS
    return [OutputFolder(args.out, kind, args.force, source_paths(args.path, args.data, args.checkpoint))]


def run(args: argparse.Namespace, console: Console) -> int:
    names = _front(args) if _is_plan(args) else _plots(args)
    console.print(f"written to {args.out}: {', '.join(names)}", highlight=False)
    return OK


def _front(args: argparse.Namespace) -> list[str]:
    from exporter.front import write_front

    why = "for a model, and the front of a plan is drawn from its plan.json alone"
    refuse_idle(args, why, "data", "images", "checkpoint", "word")
    return write_front(args.path, args.out, force=args.force)


def _plots(args: argparse.Namespace) -> list[str]:
    from exporter.plots import write_plots
    from moee.data.image_set import say_read

    with ProgressDisplay() as report:
        moee = open_artifact(args)
        calibration, held_out = moee.record.splits(args.data, report)
        say_read(train=calibration, val=held_out)
        return write_plots(
            moee, calibration, held_out, args.out, images=args.images, force=args.force, report=report, source=args.path
        )
