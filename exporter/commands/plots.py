"""`moee plots`: routing, similarity, neuron curves and patches of an extracted model."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from exporter.commands import MOVED, OK, add_checkpoint, add_out, add_outputs
from exporter.ui import ProgressDisplay
from moee.placement import OutputFolder, source_paths
from moee.result_kinds import PLOTS

TEXT = "routing, similarity of experts, neuron curves and patches of an extracted model, as SVG and JSON"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("plots", help=TEXT, description=TEXT)
    sub.set_defaults(run=run)
    sub.add_argument("path", help="folder that extract or finetune wrote")
    sub.add_argument("--data", help="default: what the model was tuned on, else extracted on")
    sub.add_argument("--images", type=int, default=256, help="held-out images that are routed (256)")
    add_checkpoint(sub, MOVED)
    add_out(sub, "the plots")
    add_outputs(sub, _outputs)


def _outputs(args: argparse.Namespace) -> list[OutputFolder]:
    return [OutputFolder(args.out, PLOTS, args.force, source_paths(args.path, args.data, args.checkpoint))]


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.plots import write_plots
    from moee import checkpoint
    from moee.data import model_transform, say_read
    from moee.errors import UserError
    from moee.sources import load_splits

    if args.images < 1:
        raise UserError(f"--images must be at least 1, came {args.images}")
    with ProgressDisplay() as report:
        moee = checkpoint.load(args.path)
        if args.checkpoint is not None:
            moee.take_weights(args.checkpoint)
        transform = model_transform(moee.model)
        source = args.data or checkpoint.recorded_data(moee.data)
        seed, head = moee.config.seed if moee.config else 0, getattr(moee.model, "num_classes", 0) or None
        calibration, held_out = load_splits(source, transform, seed, moee.classes or None, head, report)
        say_read(train=calibration, val=held_out)
        names = write_plots(moee, calibration, held_out, args.out, args.images, args.force, report)
    console.print(f"written to {args.out}: {', '.join(names)}", highlight=False)
    return OK
