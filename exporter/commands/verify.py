"""`moee verify`: parity of torch and ONNX Runtime; exit code 1 if it fails."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from exporter.commands import GATE_FAILED, OK
from exporter.ui import ProgressDisplay, percent
from moee.errors import UserError

TEXT = "parity of torch and ONNX Runtime; exit code 1 if it fails"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("verify", help=TEXT, description=TEXT)
    sub.set_defaults(run=run)
    sub.add_argument("path", help="folder that moee export wrote")
    sub.add_argument("--model", help="artifact it was exported from (default: the one its manifest names)")
    sub.add_argument("--data", help="default: the data it was extracted on")
    sub.add_argument("--threads", type=int)
    sub.add_argument("--out", help="write parity.json here")


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.onnx_export import MANIFEST, SCHEMA
    from exporter.parity import check_parity
    from moee import checkpoint
    from moee.artifact import read_manifest, write_json
    from moee.data import load_data, model_transform

    manifest = read_manifest(args.path, MANIFEST, SCHEMA)
    source = Path(args.model) if args.model else Path(args.path) / manifest["source"] if manifest["source"] else None
    if source is None:
        raise UserError(f"{args.path} does not say which model it was made from; give it with --model DIR")
    with ProgressDisplay() as report:
        moee = checkpoint.load(source)
        data = load_data(args.data or manifest["data"], model_transform(moee.model), "val")
        result = check_parity(args.path, moee, data, args.threads, report)
    table = Table(min_width=76, title=f"parity, torch and {result.runtime} (measured on CPU)")
    for column in ("batch", "max error", "mean error", "max error / rms"):
        table.add_column(column, justify="right")
    for b in result.batches:
        table.add_row(str(b.batch), f"{b.max_abs_error:.2e}", f"{b.mean_abs_error:.2e}", f"{b.relative:.2e}")
    console.print(table)
    worst = min(result.route_agreement, key=lambda name: result.route_agreement[name])
    console.print(
        f"route agreement: lowest {percent(result.route_agreement[worst])} ({worst}); "
        f"top-1 agreement: {percent(result.top1_agreement)} of {result.images} images"
    )
    if args.out:
        write_json(args.out, result.to_json())
    console.print("parity passed" if result else "parity FAILED")
    return OK if result else GATE_FAILED
