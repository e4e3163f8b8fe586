"""A GPU as a roofline sees it: per operation the larger of arithmetic time and memory time, and its launches."""

from __future__ import annotations

import math

from plugins.devices import Profile

TILE_TOKENS, TILE_WIDTH = 64, 64
EFFICIENCY = 0.6  # of the peak that dense products reach
BYTES = 2  # float16


def operation_ms(device: Profile, macs: float, moved: float, launches: int = 1) -> float:
    """Roofline time of an operation: MACs, bytes moved, kernel launches."""
    arithmetic = 2 * macs / (device.tflops * 1e12 * EFFICIENCY)
    memory = moved / (device.gbytes * 1e9)
    return max(arithmetic, memory) * 1e3 + launches * device.launch_us * 1e-3


def mlp_ms(device: Profile, dim: int, hidden: int, tokens: int, maps: int = 2) -> float:
    """An MLP of `maps` linear maps: a gated one has three, of which the first two are one product."""
    rows = math.ceil(tokens / TILE_TOKENS) * TILE_TOKENS
    moved = BYTES * (maps * dim * hidden + 2 * tokens * dim + maps * tokens * hidden)
    return operation_ms(device, maps * rows * dim * hidden, moved, 2)
