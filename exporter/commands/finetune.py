"""`moee finetune`: distil the dense model into an extracted one."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from exporter.commands import OK, add_device, add_moved, add_out, add_outputs, add_ranks, rank_display, show_skipped
from exporter.ui import stage_table, title_of
from moee.places.placement import Output, OutputFolder, resume_folder, source_paths
from moee.store.result_kinds import FINETUNE_STATE, MODEL

TEXT = "distil the dense model into an extracted one"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("finetune", help=TEXT, description=TEXT)
    sub.set_defaults(run=run)
    sub.add_argument("path", help="folder that moee extract wrote")
    sub.add_argument("--data", help="images to tune on, which become its data (default: what it was last made on)")
    sub.add_argument("--epochs", type=int)
    sub.add_argument("--batch-size", type=int)
    sub.add_argument("--lr", type=float)
    sub.add_argument("--weight-decay", type=float)
    sub.add_argument("--temperature", type=float)
    sub.add_argument("--distil", help="output (the paper's), or tokens: the last feature map too (for backbones)")
    sub.add_argument("--warmup", type=float, help="share of the steps over which the learning rate rises (0)")
    sub.add_argument("--augment", type=int, metavar="N", help="random views of each training image beside it (0)")
    sub.add_argument("--collages", type=int, metavar="N", help="collages a training image beside it (0)")
    sub.add_argument("--train", help="all, or experts: routed layers and narrowed attention alone (all)")
    sub.add_argument("--relative-lr", action="store_true", default=None, help="--lr is a share of each tensor's root mean square")
    sub.add_argument("--clip-norm", type=float, help="largest norm of a step's gradient (no limit)")
    sub.add_argument("--masked", action="store_true", default=None, help="faster steps while experts have few tokens of a batch")
    sub.add_argument("--seed", type=int)
    sub.add_argument("--train-router", action="store_true", default=None)
    sub.add_argument("--accumulate", type=int, metavar="N", help="compute a batch in N parts: less memory, same gradient (1)")
    sub.add_argument("--amp", help="bf16 or fp16: the student's products in half precision (off)")
    sub.add_argument("--force-amp", action="store_true", default=None, help="keep --amp on a CPU without instructions for it")
    sub.add_argument("--checkpointing", action="store_true", default=None, help="compute activations again: less memory")
    add_moved(sub)
    add_device(sub)
    add_ranks(sub)
    add_out(sub, "the tuned model")
    add_outputs(sub, _outputs)


def _outputs(args: argparse.Namespace) -> list[Output]:
    inputs = source_paths(args.path, args.data, args.checkpoint)
    return [OutputFolder(args.out, MODEL, args.force, inputs), resume_folder(args.out, FINETUNE_STATE, inputs)]


def run(args: argparse.Namespace, console: Console) -> int:
    from moee.config import FinetuneConfig, validated
    from moee.parallel.joining import joined
    from moee.stages.finetune import run_finetune

    names = (
        "seed", "epochs", "batch_size", "lr", "weight_decay", "temperature", "train_router", "distil", "warmup", "accumulate",
        "amp", "force_amp", "checkpointing", "augment", "collages",
        "train", "relative_lr", "clip_norm", "masked",
    )  # fmt: skip
    values = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = validated(FinetuneConfig, values)
    with joined(args.rank_timeout, args.threads, args.torch_device) as group, rank_display(group) as report:
        moee = run_finetune(
            args.path, config, args.out, args.data, args.force, report, None, group, args.workers, args.checkpoint, args.word,
        )  # fmt: skip
    if not group.leader:
        return OK
    console.print(stage_table(moee.info, title_of(moee.info, moee.spec.name, moee.data)))
    show_skipped(console, moee.info["data_read"])
    console.print(f"written to {args.out}; best epoch {moee.info['stages']['tuned']['best_epoch']}")
    return OK
