"""`moee bench`: latency of the dense and the MoEE graph, interleaved."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from exporter.commands import GATE_FAILED, OK
from exporter.ui import ProgressDisplay

TEXT = "latency of the dense and the MoEE graph, interleaved"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("bench", help=TEXT, description=TEXT)
    sub.set_defaults(run=run)
    sub.add_argument("path", help="folder that moee export wrote")
    sub.add_argument("--batch", type=int, default=8)
    sub.add_argument("--runs", type=int, default=40)
    sub.add_argument("--threads", type=int)
    sub.add_argument("--out", help="write latency.json here")
    sub.add_argument("--fail-if-slower", action="store_true", help="exit code 1 if MoEE is slower than dense")


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.latency import bench
    from exporter.onnx_export import MANIFEST, SCHEMA
    from moee.artifact import read_manifest, write_json
    from moee.data import Transform, batches, load_data

    manifest = read_manifest(args.path, MANIFEST, SCHEMA)
    given = manifest["input"]
    with ProgressDisplay() as report:
        images = None
        if manifest["data"] in ("digits", "photos"):
            transform = Transform(given["size"], tuple(given["mean"]), tuple(given["std"]), {})
            images = next(batches(load_data(manifest["data"], transform, "val"), args.batch)).images.numpy()
        result = bench(args.path, args.batch, args.runs, args.threads, images, report)
    console.print(latency_table(result))
    if args.out:
        write_json(args.out, result.to_json())
    if args.fail_if_slower and result.speedup < 1:
        console.print(f"MoEE is slower than dense: {result.speedup:.2f}x")
        return GATE_FAILED
    return OK


def latency_table(result: Any) -> Table:
    title = f"latency, batch {result.batch}, {result.threads} threads, {result.runtime} (measured on CPU)"
    table = Table(min_width=76, title=title)
    for column in ("", "p50 ms", "p95 ms"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in (("dense", result.dense_ms), ("MoEE", result.moee_ms)):
        table.add_row(name, f"{values['p50']:.2f}", f"{values['p95']:.2f}")
    ideal = f" of ideal {result.ideal_speedup:.2f}x" if result.ideal_speedup else ""
    table.caption = f"speed-up {result.speedup:.2f}x ({result.speedup_p5:.2f} to {result.speedup_p95:.2f}){ideal}"
    return table
