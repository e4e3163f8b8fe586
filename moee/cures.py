"""What to do about a refusal, by what can be given where it is met: commands and functions share code, and not all options."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

NAMED = re.compile(r"--[a-z][a-z0-9-]*")
_OFFERED: ContextVar[frozenset[str] | None] = ContextVar("options", default=None)


@contextmanager
def offering(flags: Iterable[str]) -> Iterator[None]:
    """A block in which a user can give these options, as `--flag`; outside of any, all are taken to be there."""
    before = _OFFERED.set(frozenset(flags))
    try:
        yield
    finally:
        _OFFERED.reset(before)


def offered(*flags: str) -> bool:
    """Whether a user can give all of these options."""
    there = _OFFERED.get()
    return there is None or there.issuperset(flags)


def cures(*ways: str, elsewhere: str = "") -> str:
    """Those of the `ways` out whose options can be given here, joined by "or"; `elsewhere` where there are none."""
    left = [way for way in ways if offered(*NAMED.findall(way))]
    return ", or ".join(left) or elsewhere


def without(name: str) -> str:
    """How a layer is left as it is, from any command."""
    return cures(f"leave it dense with --exclude {name}", elsewhere=f"moee extract leaves it dense with --exclude {name}")
