"""Bounds of numbers that users give: the command line and the Python interface take the same."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from moee.config import MOST_BATCH, MOST_COUNT, MOST_WORKERS
from moee.errors import UserError
from moee.schema import shown


class Bounds(NamedTuple):
    """The least and the largest number that is taken."""

    least: float
    most: float


class Counts(NamedTuple):
    """The same for whole numbers."""

    least: int
    most: int


DAY = 86_400  # seconds
IMAGES = Counts(0, MOST_COUNT)  # that accuracy is measured on
BATCH = Counts(1, MOST_BATCH)
RUNS = Counts(1, 1_000_000)
JOBS = Counts(1, MOST_WORKERS)  # and threads, and requests in flight
WORKERS = Counts(0, MOST_WORKERS)
CLASSES = Counts(0, 1 << 20)  # the largest ImageNet has 21,843
CALIBRATION = Counts(1, MOST_COUNT)
DROP = Bounds(0, 100)  # percentage points
CANDIDATES = Counts(1, 20)  # of one measurement on a device: each is exported, built and timed
AGREEMENT = Bounds(0, 1)
SECONDS = Bounds(0, DAY)
MEMORY = Counts(1 << 26, 1 << 50)  # bytes


def whole(name: str, value: Any, bounds: Counts) -> int:
    """A whole number within `bounds`; True and False are none. Raises `UserError`, which calls it `name`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not bounds.least <= int(value) <= bounds.most:
        raise UserError(f"{name}: expected a whole number from {bounds.least} to {bounds.most}, came {shown(value, limit=40)}")
    return int(value)


def size(name: str, value: Any) -> int:
    """Bytes within `MEMORY`: a whole number of them, or text such as `8G`, `7.5GiB` or `900M`. Raises `UserError` as `whole`."""
    found = None
    if isinstance(value, str):
        parts = re.fullmatch(r"(\d{1,7}(?:\.\d{1,3})?)([MGT])(?:i?B)?", value.strip(), re.IGNORECASE)
        found = int(float(parts[1]) * 2 ** {"M": 20, "G": 30, "T": 40}[parts[2].upper()]) if parts else None
    elif isinstance(value, numbers.Integral) and not isinstance(value, bool):
        found = int(value)
    if found is None or not MEMORY.least <= found <= MEMORY.most:
        raise UserError(f"{name}: expected a size from 64M to 1024T, such as 8G; came {shown(value, limit=40)}")
    return found


def real(name: str, value: Any, bounds: Bounds) -> float:
    """A number within `bounds`, never NaN. A gate at another could not fail, or not pass. Raises `UserError` as `whole`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not bounds.least <= float(value) <= bounds.most:
        raise UserError(f"{name}: expected a number from {bounds.least:g} to {bounds.most:g}, came {shown(value, limit=40)}")
    return float(value)


def several(name: str, values: Any, bounds: Counts) -> tuple[int, ...]:
    """Whole numbers within `bounds`, one or more. Raises `UserError` as `whole`."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise UserError(f"{name}: expected whole numbers in a list, came {shown(values, limit=40)}")
    found = tuple(whole(name, value, bounds) for value in values)
    if not found:
        raise UserError(f"{name}: expected one number or more, came none")
    return found
