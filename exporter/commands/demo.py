"""`moee demo`: `moee compress` on a real pretrained ViT-S and built-in images, and engines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from exporter.terminal.flags import GATE_FAILED, OK, add_device, add_out, add_outputs
from exporter.terminal.ui import ProgressDisplay
from moee.places.staged_folder import StagedFolder

TEXT = "compress a real pretrained ViT-S on built-in images, and build engines on the CPU"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("demo", help=TEXT, description=TEXT)
    sub.set_defaults(run=run, loads="exporter.demo")
    choices = ("photo-crops", "digits")
    what = "the built-in images: 20 photographs to be told apart, or handwritten digits (photo-crops)"
    sub.add_argument("--data", choices=choices, default=choices[0], metavar="NAME", help=what)
    add_device(sub)
    add_out(sub, "all results")
    add_outputs(sub, lambda args: [StagedFolder(args.out, force=args.force)])


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.demo import run_demo

    with ProgressDisplay() as report:
        result = run_demo(args.out, force=args.force, report=report, data=args.data, device=args.torch_device)
    for line in result.compressed.lines:
        console.print(line, highlight=False, soft_wrap=True)
    engine = result.summary["engine"]
    if engine:
        console.print(f"engine: {engine['builder']}, {engine['plugin_layers']} plugin layers, {engine['path']}")
    if result.engine_error:
        console.print(f"no engines: {result.engine_error}", highlight=False)
    console.print(f"summary written to {Path(args.out) / 'summary.json'}", soft_wrap=True)
    return GATE_FAILED if result.engine_error else OK
