"""`moee plugin`: the TensorRT plugin: build it, or bundle it for a device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from exporter.terminal.flags import OK, add_out, add_outputs
from exporter.terminal.ui import ProgressDisplay
from moee.places.output_file import OutputFile
from moee.places.output_folder import OutputFolder
from moee.store.result_kinds import PLUGIN, PLUGIN_BUNDLE
from plugins.devices import HOW, parse_sm, parse_sms


def add_parser(subparsers: Any) -> None:
    plugin = subparsers.add_parser("plugin", help="the TensorRT plugin: build it, or bundle it for a device")
    actions = plugin.add_subparsers(dest="action", required=True, metavar="ACTION")
    sub = actions.add_parser("build", help="compile the kernels and the library (cached)")
    sub.add_argument("--sm", default="all", help=f"devices of the kernels, separated by commas: {HOW} (all)")
    sub.add_argument("--out", metavar="FILE", help="copy the library to this file; an earlier one is overwritten")
    sub.add_argument("--force", action="store_true", help="replace an existing file of another kind")
    add_outputs(sub, lambda args: [OutputFile(args.out, PLUGIN, args.force)] if args.out is not None else [])
    sub.set_defaults(run=run_build)
    sub = actions.add_parser("bundle", help="a folder that compiles on the device with g++ and cmake alone")
    sub.add_argument("--sm", required=True, help=f"the device: {HOW}")
    add_out(sub, "the bundle")
    add_outputs(sub, lambda args: [OutputFolder(args.out, PLUGIN_BUNDLE, args.force)])
    sub.set_defaults(run=run_bundle)


def run_build(args: argparse.Namespace, console: Console) -> int:
    import shutil

    from exporter.engines.plugin_cache import ensure_plugin

    with ProgressDisplay() as report:
        library = ensure_plugin(parse_sms(args.sm), report)
    if args.out is not None:
        with OutputFile(args.out, PLUGIN, args.force).write() as temporary:
            shutil.copy2(library, temporary)
        library = Path(args.out)
    console.print(f"plugin: {library} ({library.stat().st_size / 2**20:.1f} MiB)", soft_wrap=True)
    return OK


def run_bundle(args: argparse.Namespace, console: Console) -> int:
    from exporter.engines.plugin_cache import ensure_kernels
    from plugins.library.bundle import write_bundle
    from plugins.library.cases import stand_in

    sm = parse_sm(args.sm)
    with ProgressDisplay() as report:
        write_bundle(Path(args.out), sm, ensure_kernels((sm,), report), args.force, cases=(stand_in(),))
    console.print(f"bundle for sm_{sm} written to {args.out}; its README says how to compile it on the device")
    return OK
