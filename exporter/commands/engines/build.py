"""`moee build`: build dense and MoEE engines from an export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from exporter.terminal.flags import GATE_FAILED, OK, add_out, add_outputs, add_shapes
from exporter.terminal.idle import keep_defaults, refuse_idle
from exporter.terminal.ui import FittingTable, ProgressDisplay
from moee.places.inputs import source_paths
from moee.places.output_file import OutputFile
from moee.places.output_folder import OutputFolder
from moee.places.placement import Output
from moee.store.result_kinds import ENGINE, TIMING_CACHE
from plugins.devices import HOW, parse_sms

TEXT = "build dense and MoEE engines from an export"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("build", help=TEXT, description=TEXT)
    sub.set_defaults(check=check, run=run, loads="exporter.engines.build")
    sub.add_argument("path", help="folder that moee export wrote")
    sub.add_argument("--backend", default="tensorrt-rtx", help="tensorrt-rtx (needs no GPU) or tensorrt")
    sub.add_argument("--plugin", help="plugin library (default: compiled and cached for --sm)")
    sub.add_argument("--sm", default="all", help=f"devices of the plugin's kernels, separated by commas: {HOW} (all)")
    add_shapes(sub)
    cache = "TensorRT's timing cache, read and written: a new file or an earlier cache"
    sub.add_argument("--timing-cache", "--timingCacheFile", metavar="FILE", help=cache)
    add_out(sub, "dense.plan, moee.plan and engine.json")
    add_outputs(sub, _outputs)
    keep_defaults(sub)


def check(args: argparse.Namespace) -> None:
    """What can be said of the line alone."""
    if args.plugin is not None:
        refuse_idle(args, "for the plugin that is compiled, and --plugin names one that exists", "sm")


def _outputs(args: argparse.Namespace) -> list[Output]:
    inputs = source_paths(args.path, args.plugin)
    outputs: list[Output] = [OutputFolder(args.out, ENGINE, args.force, inputs)]
    if args.timing_cache is not None:
        outputs.append(OutputFile(args.timing_cache, TIMING_CACHE, inputs=inputs, option="--timing-cache"))
    return outputs


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.engines.build import BuildFailed, build_engines, needs_plugin, require_backend
    from exporter.engines.plugin_cache import ensure_plugin
    from exporter.timing.profile import batch_profile

    sms = parse_sms(args.sm)
    batch = batch_profile(Path(args.path), args.min_shapes, args.opt_shapes, args.max_shapes)
    require_backend(args.backend)
    with ProgressDisplay() as report:
        plugin = Path(args.plugin) if args.plugin else None
        if plugin is None and needs_plugin(args.path):
            plugin = ensure_plugin(sms, report)
        try:
            result = build_engines(
                Path(args.path), Path(args.out), plugin=plugin, backend=args.backend, batch=batch,
                timing_cache=Path(args.timing_cache) if args.timing_cache else None, force=args.force,
                progress=lambda text: report.line(text),
            )  # fmt: skip
        except BuildFailed as error:
            console.print(f"build FAILED: {error}")
            return GATE_FAILED
    table = FittingTable(f"engines by {result.builder}, batch {'/'.join(map(str, batch))}")
    for column in ("", "file", "MiB", "build s"):
        table.add_column(column)
    for name, engine in (("dense", result.dense), ("MoEE", result.moee)):
        table.add_row(name, engine.file, f"{engine.size_bytes / 2**20:.1f}", f"{engine.build_s:.1f}")
    console.print(table)
    console.print(f"{result.plugin_layers} plugin layers; target: {result.target}; written to {args.out}")
    return OK
