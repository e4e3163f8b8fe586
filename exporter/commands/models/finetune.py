"""`moee finetune`: distil the dense model into an extracted one."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from exporter.terminal.advice import after_finetune
from exporter.terminal.flags import OK, add_device, add_moved, add_out, add_outputs, add_ranks, rank_display, show_skipped
from exporter.terminal.options import add_options, flag_of, given_options
from exporter.terminal.space import add_memory
from exporter.terminal.ui import stage_table, title_of
from moee.config import FinetuneConfig, validated
from moee.errors import UserError
from moee.methods.recipe import tuning_of
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder, resume_folder
from moee.places.placement import Output
from moee.store.result_kinds import FINETUNE_STATE, MODEL

TEXT = "distil the dense model into an extracted one"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("finetune", help=TEXT, description=TEXT)
    sub.set_defaults(run=run, loads="moee.stages.finetune")
    sub.add_argument("path", help="folder that moee extract wrote")
    sub.add_argument("--data", help="images to tune on, which become its data (default: what it was last made on)")
    sub.add_argument("--recipe", metavar="FILE", help="the [tune] of this TOML file (docs/recipes.md); takes no other option")
    add_options(sub.add_argument_group("options of the tuning"), FinetuneConfig)
    add_moved(sub)
    add_device(sub)
    add_ranks(sub)
    add_memory(sub)
    add_out(sub, "the tuned model")
    add_outputs(sub, _outputs)


def _outputs(args: argparse.Namespace) -> list[Output]:
    inputs = source_paths(args.path, args.data, args.checkpoint, args.recipe)
    return [OutputFolder(args.out, MODEL, args.force, inputs), resume_folder(args.out, FINETUNE_STATE, inputs)]


def run(args: argparse.Namespace, console: Console) -> int:
    from moee.parallel.joining import joined
    from moee.stages.finetune import run_finetune

    values = given_options(args, [FinetuneConfig])
    config = validated(FinetuneConfig, values)
    if args.recipe is not None:
        if values:
            raise UserError(f"--recipe decides how it is tuned; leave {', '.join(map(flag_of, values))} out")
        config = tuning_of(args.recipe)
    with joined(args.rank_timeout, args.threads, args.torch_device) as group, rank_display(group) as report:
        moee = run_finetune(
            args.path, config, args.out, source=args.data, force=args.force, report=report, session=None, group=group,
            workers=args.workers, weights=args.checkpoint, model=args.word, memory=args.memory,
        )  # fmt: skip
    if not group.leader:
        return OK
    console.print(stage_table(moee.info, title_of(moee.info, moee.spec.name, moee.data)))
    show_skipped(console, moee.info["data_read"])
    console.print(f"written to {args.out}", highlight=False)
    words = ["--model", args.word] if args.word is not None else []
    console.print(after_finetune(moee.info, args.path, args.out, words), highlight=False, soft_wrap=True)
    return OK
