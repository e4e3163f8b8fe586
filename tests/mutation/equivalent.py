"""Mutants that no test can notice, each with the reason: the program does the same, or what differs is promised nowhere."""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str], str] = {}
"""By file, line before and line after."""
