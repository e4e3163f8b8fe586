"""Progress as a callback. A reporter is called with (message, done, total), total 0 where the length is unknown.

The library itself prints nothing; the command line turns reports into bars or lines, the Python interface into lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Reporter = Callable[[str, int, int], None]
T = TypeVar("T")
LINE_INTERVAL_S = 10.0


def silent(message: str, done: int, total: int) -> None:
    """The reporter that says nothing."""


def track(items: Iterable[T], message: str, total: int, report: Reporter = silent) -> Iterator[T]:
    """Yield the items and report after each."""
    report(message, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        report(message, done, total)


@contextmanager
def reported(message: str, report: Reporter, really: bool = True) -> Iterator[None]:
    """A block that is one step, which is reported if it is `really` worth it."""
    if really:
        report(message, 0, 1)
    yield
    if really:
        report(message, 1, 1)


class Lines:
    """A reporter that writes a line at the end of each step, and every 10 s on the way."""

    def __init__(self, write: Callable[[str], None]):
        self.write = write
        self.started: dict[str, float] = {}
        self.printed: dict[str, float] = {}

    def __call__(self, message: str, done: int, total: int) -> None:
        now = time.monotonic()
        if message not in self.started or done == 0:
            self.started[message] = now
            self.printed[message] = now
        elapsed = now - self.started[message]
        if total == 0:
            if now - self.printed[message] >= LINE_INTERVAL_S:
                self.printed[message] = now
                self.write(f"{message}: {done} so far, {elapsed:.0f} s")
        elif done >= total:
            del self.started[message]  # a step of the same name begins anew, also where nothing says so
            self.write(f"{message}: done in {elapsed:.1f} s")
        elif now - self.printed[message] >= LINE_INTERVAL_S:
            self.printed[message] = now
            left = elapsed / done * (total - done) if done else float("nan")
            self.write(f"{message}: {done}/{total}, {elapsed:.0f} s, about {left:.0f} s left")


def to_stderr() -> Lines:
    """A reporter that writes to standard error."""
    return Lines(lambda text: print(text, file=sys.stderr, flush=True))
