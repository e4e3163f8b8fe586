"""The flags that say where a command's files lie while it runs, and how much memory it may take."""

from __future__ import annotations

import argparse

from moee.bounds import size
from moee.errors import UserError


def add_scratch(parser: argparse.ArgumentParser) -> None:
    """`--scratch`, of the commands that keep tokens on disk while they run."""
    what = "folder for the tokens that are kept while it runs, gigabytes for large models (TMPDIR, else the system's)"
    parser.add_argument("--scratch", metavar="DIR", help=what)


def add_memory(parser: argparse.ArgumentParser) -> None:
    """`--memory`, of the commands that can do with less of it."""
    what = "most memory that a process may take, such as 8G or 900M; work is cut into smaller pieces, or refused (no bound)"
    parser.add_argument("--memory", type=size_of, metavar="SIZE", help=what)


def size_of(text: str) -> int:
    """A type for argparse: `8G`, `7.5GiB` or `900M`, in bytes."""
    try:
        return size("", text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from error
