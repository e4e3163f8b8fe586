"""`moee demo`: everything, on a real pretrained ViT-S and scikit-learn's digits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from exporter.commands.engines.bench import latency_table
from exporter.terminal.flags import GATE_FAILED, OK, add_device, add_out, add_outputs, at_least
from exporter.terminal.ui import ProgressDisplay, number, percent, stage_table
from moee.config import MOST_EPOCHS
from moee.places.demo_folder import DemoFolder

TEXT = "everything, on a real pretrained ViT-S and scikit-learn's digits"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("demo", help=TEXT, description=TEXT)
    sub.set_defaults(run=run)
    sub.add_argument("--epochs", type=at_least(1, MOST_EPOCHS), default=3, help="epochs of fine-tuning")
    add_device(sub)
    add_out(sub, "all results")
    add_outputs(sub, lambda args: [DemoFolder(args.out, force=args.force)])


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.demo import run_demo

    with ProgressDisplay() as report:
        result = run_demo(args.out, force=args.force, report=report, epochs=args.epochs, device=args.torch_device)
    console.print(stage_table(result.moee.info, f"{result.summary['model']} on {result.summary['dataset']}"))
    console.print(latency_table(result.latency))
    parity = result.parity
    console.print(
        f"parity {'passed' if parity else 'FAILED'}: max error {parity.max_abs_error:.2e}, "
        f"route agreement {number(parity.mean_route_agreement, 6)}, top-1 agreement {percent(parity.top1_agreement)}"
    )
    engine = result.summary["engine"]
    if engine:
        console.print(f"engine built on CPU by {engine['builder']}: {engine['plugin_layers']} plugin layers, {engine['path']}")
    if result.engine_error:
        console.print(f"no engines: {result.engine_error}", highlight=False)
    console.print(f"summary written to {Path(args.out) / 'summary.json'}, report to {Path(args.out) / 'report.html'}")
    return OK if parity and not result.engine_error else GATE_FAILED
