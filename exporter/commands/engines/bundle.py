"""`moee bundle`: a folder to copy to a device and to build there."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from exporter.terminal.flags import OK, add_out, add_outputs, add_shapes, add_word
from exporter.terminal.ui import ProgressDisplay
from moee.errors import UserError
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder
from moee.store.result_kinds import DEPLOYMENT
from plugins.devices import HOW, parse_sm

TEXT = "everything a device needs: graphs, plugin, runner, server configurations, build.sh"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("bundle", help=TEXT, description=TEXT)
    sub.set_defaults(run=run, loads="exporter.ship.deployment")
    sub.add_argument("path", help="folder that moee export wrote")
    sub.add_argument("--sm", required=True, help=f"the device: {HOW}; or cpu, for ONNX Runtime")
    add_shapes(sub)
    add_word(sub)
    add_out(sub, "the bundle")
    add_outputs(sub, lambda args: [OutputFolder(args.out, DEPLOYMENT, args.force, source_paths(args.path))])


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.engines.plugin_cache import ensure_kernels
    from exporter.manifests import read_export, refuse_module
    from exporter.ship.cpu_bundle import CPU, write_cpu_bundle
    from exporter.ship.deployment import write_deployment
    from exporter.timing.profile import batch_profile

    sm = None if args.sm == CPU else parse_sm(args.sm)
    call = f"exporter.bundle({args.path!r}, {args.out!r}, sm={args.sm!r}, model=MODULE) with that module as MODULE"
    refuse_module(read_export(args.path, verify=False), args.path, call)
    shapes = (args.min_shapes, args.opt_shapes, args.max_shapes)
    if sm is None:
        if any(shape is not None for shape in shapes):
            raise UserError("shapes are for engines, and a bundle for the CPU has none; leave them out")
        folder = write_cpu_bundle(args.path, args.out, force=args.force, word=args.word)
        what, how = "the CPU", "run.py in it runs images, by ONNX Runtime"
    else:
        batch = batch_profile(Path(args.path), *shapes)
        with ProgressDisplay() as report:
            kernels = partial(ensure_kernels, (sm,), report)
            folder = write_deployment(args.path, args.out, sm, kernels, batch, force=args.force, word=args.word)
        what, how = f"sm_{sm}", "run build.sh in it on the device"
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20
    console.print(f"bundle for {what} written to {args.out} ({size:.0f} MiB); {how}", soft_wrap=True)
    return OK
