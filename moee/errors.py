"""The errors that the command line turns into exit codes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_])")  # a terminal's: colours, titles, links


def printable(text: str) -> bool:
    """Whether text can be shown on one line as it is. Python calls no space printable but one; file names have others too."""
    return text.isprintable() or all(c.isprintable() or unicodedata.category(c) == "Zs" for c in text)


def plain(text: str) -> str:
    """Text that may come from someone else, fit to be shown on one line: line ends become spaces, terminals' escape sequences
    nothing, other control characters "?"."""
    return "".join(c if printable(c) else " " if c == "\n" else "?" for c in ESCAPES.sub("", text))


class UserError(ValueError):
    """Bad input: what was expected, what came, what to do, in one sentence. Exit code 2.

    Messages quote what came, and that may be a file from someone else: nothing in them controls a terminal (`plain`).
    """

    def __init__(self, message: str):
        super().__init__(plain(message))


class MissingDependency(RuntimeError):
    """The environment lacks something; the message names it and the command that installs it. Exit code 3."""


class StepFailed(RuntimeError):
    """A step that the environment allows was tried and failed, such as a compilation. One sentence; exit code 1."""


class OutOfReach(UserError):
    """A cost that this model cannot be brought down to."""


class BudgetUnmet(UserError):
    """Nothing that was tried meets the budget; the message names what comes nearest. Exit code 1."""


class NothingRouted(UserError):
    """No layer showed two clusters, so the model would stay dense."""


class RankLost(StepFailed):
    """Another process of a distributed run is gone. `speaks`: this process is the one of its machine that says so."""

    def __init__(self, message: str, speaks: bool):
        super().__init__(message)
        self.speaks = speaks


def chosen(table: Mapping[str, T], name: str, what: str) -> T:
    """What stands in `table` under `name`: a choice by name has no default. Raises `UserError` for another name; `what` says what
    it is of."""
    if name not in table:
        raise UserError(f"unknown {what} {name!r}; expected one of {', '.join(table)}")
    return table[name]


class OptionError(UserError):
    """An option that is unknown, or whose value does not fit; `option` is its name, empty where several do not go together."""

    def __init__(self, text: str, option: str = ""):
        super().__init__(text)
        self.option = option
