"""`moee export`: write dense, portable and TensorRT ONNX graphs."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from exporter.commands import OK, add_out
from exporter.ui import ProgressDisplay

TEXT = "write dense, portable and TensorRT ONNX graphs"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("export", help=TEXT, description=TEXT)
    sub.set_defaults(run=run)
    sub.add_argument("path", help="folder that moee extract or finetune wrote")
    sub.add_argument(
        "--precision", default="fp32", help="fp32, fp16 or bf16; norms, softmax and routing stay in float32 (fp32)"
    )
    add_out(sub, "the graphs")


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.onnx_export import export
    from moee import checkpoint

    with ProgressDisplay() as report:
        export(checkpoint.load(args.path), args.out, args.force, report, source=args.path, precision=args.precision)
    console.print(f"dense.onnx, portable.onnx and tensorrt.onnx written to {args.out}")
    return OK
