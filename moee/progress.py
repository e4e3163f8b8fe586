"""Progress as a callback, so that the library prints nothing by itself.

A reporter is called with (message, done, total), total 0 where the length is unknown; the command line turns that into bars or
plain lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Reporter = Callable[[str, int, int], None]
T = TypeVar("T")


def silent(message: str, done: int, total: int) -> None:
    """The reporter that says nothing."""


def track(items: Iterable[T], message: str, total: int, report: Reporter = silent) -> Iterator[T]:
    """Yield the items and report after each."""
    report(message, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        report(message, done, total)
