"""The command line: `moee COMMAND`. Each command parses its flags, calls one function and shows the result.

Exit codes: 0 ok, 1 a gate or a step failed, 2 usage or bad input, 3 the environment lacks something, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from rich.console import Console

from exporter import ranks
from exporter.commands import (
    BAD_INPUT,
    ENVIRONMENT,
    GATE_FAILED,
    INTERRUPTED,
    ablate,
    ablate_clear,
    bench,
    bench_dispatch,
    build,
    bundle,
    demo,
    doctor,
    export,
    extract,
    finetune,
    inspect,
    plan,
    plots,
    plugin,
    report,
    verify,
)
from moee import __version__
from moee.errors import MissingDependency, StepFailed, UserError

MAX_SENTENCE = 2000  # characters
COMMANDS = (
    plan, extract, finetune, export, verify, bench, bench_dispatch, build, bundle, plugin, inspect, plots, report, ablate,
    ablate_clear, doctor, demo,
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="moee", description="Extract experts from Vision Transformers and ship them.")
    parser.add_argument("--version", action="version", version=f"moee {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(subparsers)
    return parser


def sentence(error: BaseException) -> str:
    """An error as one line. It may quote a file from someone else: what would control the terminal is not passed on."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    return text if len(text) <= MAX_SENTENCE else f"{text[:MAX_SENTENCE]}..."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    # before torch is imported: OpenMP threads that spin at barriers slow a shared machine down about fivefold
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120, quiet=ranks.follower())
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

    def say(error: BaseException, text: str = "") -> None:
        if ranks.speaks(error):
            errors.print(f"moee: {text or sentence(error)}")

    try:
        ranks.prepare(args)
        return args.run(args, console)
    except UserError as error:
        if args.debug:
            raise
        say(error)
        return BAD_INPUT
    except MissingDependency as error:
        if args.debug:
            raise
        say(error)
        return ENVIRONMENT
    except StepFailed as error:
        if args.debug:
            raise
        say(error)
        ranks.leave(error, GATE_FAILED)
        return GATE_FAILED
    except KeyboardInterrupt as error:
        say(error, "interrupted; earlier results are as they were")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
