"""The roofline held against what a device measured: by how much it is off, and the scale that follows. It stays a ranking aid."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

from moee.planning.budget import StoredLatency
from moee.planning.shortlist import Scale
from plugins.devices import DEVICES, PROFILES, Device


def device_of(name: str) -> Device | None:
    """The device of our table that a maker's name says, such as `NVIDIA Jetson AGX Orin Developer Kit`: the one with most words,
    all of which are in it."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    holding = [device for device in DEVICES if set(device.name.split("-")) <= words]
    return max(holding, key=lambda device: len(device.name.split("-")), default=None)


def board_of(name: str) -> str | None:
    """The board whose figures model the device of a maker's name; None for one that has none."""
    device = device_of(name)
    return device.name if device is not None and device.name in PROFILES else None


def roofline_facts(
    board: str | None, device: str, modelled: Sequence[dict[str, StoredLatency]], latencies: Sequence[dict[str, Any] | str],
    dense_ms: float,
) -> dict[str, Any] | None:  # fmt: skip
    """Measured over modelled milliseconds, of dense and of each candidate that was timed, by the roofline of `board`, or else of
    the board of the device's name. `speedup_error`: by which share of the measured speedup the modelled one is off, at worst.
    None where there is no such board, or nothing was timed."""
    board = board or board_of(device)
    pairs = [
        (figures[board], said) for figures, said in zip(modelled, latencies, strict=True)
        if isinstance(said, dict) and board is not None and board in figures
    ]  # fmt: skip
    if not pairs:
        return None
    ratios = [said["moee_ms"] / figure.moee_ms for figure, said in pairs]
    errors = [abs(figure.dense_ms / figure.moee_ms / said["speedup"] - 1) for figure, said in pairs]
    facts = {
        "board": board, "dense": dense_ms / pairs[0][0].dense_ms, "candidates": ratios, "median": statistics.median(ratios),
        "speedup_error": max(errors),
    }  # fmt: skip
    return {**facts, "said": _sentence(facts)}


def scale_of(roofline: dict[str, Any] | None) -> Scale | None:
    """The scale that brings the roofline's figures to what was measured."""
    return None if roofline is None else Scale(roofline["board"], roofline["dense"], roofline["median"])


def _sentence(roofline: dict[str, Any]) -> str:
    """The error as a sentence."""
    low, high = min(roofline["candidates"]), max(roofline["candidates"])
    between = f"{low:.2f}x" if low == high else f"{low:.2f}x to {high:.2f}x"
    dense, error = f"{roofline['dense']:.2f}x", f"{roofline['speedup_error']:.0%}"
    return (
        f"the roofline of {roofline['board']}, which knows float16 alone, against these times: dense took {dense} its figure, "
        f"candidates {between}; its speedups are off by up to {error}. It only ranks, scaled by this, what was not measured"
    )
