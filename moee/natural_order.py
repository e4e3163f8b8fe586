"""Natural order of names: "2" before "10"."""

from __future__ import annotations

import re
from collections.abc import Iterable


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names in natural order."""
    return tuple(sorted(names, key=natural_key))


def natural_key(text: str) -> tuple[list[int | str], str]:
    """A sort key that counts: "2" before "10", upper and lower case alike, as timm's reader sorts; equal ones by their bytes."""
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], text
