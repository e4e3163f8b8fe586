"""`moee report`: one HTML file about a run."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from exporter.terminal.flags import OK, add_outputs
from moee.places.inputs import source_paths
from moee.places.output_file import OutputFile
from moee.store.result_kinds import REPORT

TEXT = "one HTML file about a run: front of a plan, cost, retention, parity, latency, classes, routing, patches of experts"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("report", help=TEXT, description=TEXT)
    sub.set_defaults(run=run)
    sub.add_argument("paths", nargs="+", metavar="PATH", help="folders that moee commands wrote, or their JSON files")
    sub.add_argument("--out", default="report.html", metavar="FILE", help="the file (report.html); refused if it exists")
    sub.add_argument("--force", action="store_true", help="replace an existing file")
    add_outputs(sub, lambda args: [OutputFile(args.out, REPORT, args.force, source_paths(*args.paths))])
    sub.add_argument("--no-hash-check", action="store_true", help="do not compare files with the hashes that manifests list")


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.report import write_report

    path = write_report(args.paths, args.out, args.force, verify=not args.no_hash_check)
    console.print(f"report written to {path} ({path.stat().st_size / 1024:.0f} KiB)", soft_wrap=True)
    return OK
