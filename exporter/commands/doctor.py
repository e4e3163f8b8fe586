"""`moee doctor`: what is installed, what is missing, how to add it."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from exporter.terminal.flags import ENVIRONMENT, OK
from exporter.terminal.ui import FittingTable

TEXT = "what is installed, what is missing, how to add it"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("doctor", help=TEXT, description=TEXT)
    sub.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.doctor import checks

    table = FittingTable("moee doctor")
    for column in ("", "found", "to add it"):
        table.add_column(column)
    found = checks()
    for check in found:
        table.add_row(check.name, check.found or "missing", "" if check.found else check.fix)
    console.print(table)
    return ENVIRONMENT if any(c.required and not c.found for c in found) else OK
