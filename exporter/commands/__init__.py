"""One module a command: `add_parser` declares its flags, `run` calls one function, shows the result, returns the exit code."""

from __future__ import annotations

import argparse

OK, GATE_FAILED, BAD_INPUT, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    """`--out`, refused if it exists, and `--force`."""
    parser.add_argument("--out", required=True, help=f"folder for {what}; refused if it exists")
    parser.add_argument("--force", action="store_true", help="replace an existing output folder")
