"""Figures as people read them. A manifest may lack any of them or hold nonsense: those show as a dash."""

from __future__ import annotations

import math
from typing import Any

DASH = "–"


def dig(body: Any, *keys: str | int) -> Any:
    """`body[k0][k1]...`, or None where a step is missing."""
    for key in keys:
        try:
            body = body[key]
        except (KeyError, IndexError, TypeError):
            return None
    return body


def real(value: Any) -> float | None:
    """`value` as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def numbers(values: Any) -> list[float]:
    """The finite numbers of a list; empty if it is none or holds anything else."""
    found = [real(v) for v in values] if isinstance(values, list) else []
    return [v for v in found if v is not None] if all(v is not None for v in found) else []


def word(value: Any) -> str:
    """A text, or a finite number as it is; a dash for anything else, such as a list or an empty text."""
    if isinstance(value, str):
        return value or DASH
    return DASH if real(value) is None else str(value)


def percent(value: Any, digits: int = 2) -> str:
    number = real(value)
    return DASH if number is None else f"{number:.{digits}%}"


def fixed(value: Any, digits: int = 4, unit: str = "") -> str:
    number = real(value)
    return DASH if number is None else f"{number:,.{digits}f}{unit}"


def scientific(value: Any) -> str:
    number = real(value)
    return DASH if number is None else f"{number:.2e}"


def scaled(value: Any, unit: float, digits: int = 3, suffix: str = "") -> str:
    number = real(value)
    return DASH if number is None else f"{number / unit:,.{digits}f}{suffix}"


def change(new: Any, old: Any) -> str:
    """`new` against `old` as a signed share, with a true minus sign."""
    after, before = real(new), real(old)
    if after is None or not before:
        return DASH
    return f"{after / before - 1:+.1%}".replace("-", "−")
