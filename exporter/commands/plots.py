"""`moee plots`: routing, similarity, neuron curves and patches of an extracted model."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from exporter.terminal.flags import OK, add_moved, add_out, add_outputs, at_least, open_artifact
from exporter.terminal.ui import ProgressDisplay
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder
from moee.store.result_kinds import PLOTS

TEXT = "routing, similarity of experts, neuron curves and patches of an extracted model, as SVG and JSON"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("plots", help=TEXT, description=TEXT)
    sub.set_defaults(run=run)
    sub.add_argument("path", help="folder that extract or finetune wrote")
    sub.add_argument("--data", help="default: what the model was tuned on, else extracted on")
    sub.add_argument("--images", type=at_least(1), default=256, help="held-out images that are routed (256)")
    add_moved(sub)
    add_out(sub, "the plots")
    add_outputs(sub, _outputs)


def _outputs(args: argparse.Namespace) -> list[OutputFolder]:
    return [OutputFolder(args.out, PLOTS, args.force, source_paths(args.path, args.data, args.checkpoint))]


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.plots import write_plots
    from moee.data.image_set import say_read

    with ProgressDisplay() as report:
        moee = open_artifact(args)
        calibration, held_out = moee.record.splits(args.data, report)
        say_read(train=calibration, val=held_out)
        names = write_plots(
            moee, calibration, held_out, args.out, images=args.images, force=args.force, report=report, source=args.path
        )
    console.print(f"written to {args.out}: {', '.join(names)}", highlight=False)
    return OK
