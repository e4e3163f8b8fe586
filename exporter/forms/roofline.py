"""A GPU as a roofline sees it: per operation the larger of arithmetic time and memory time, and its launches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from plugins.devices import Profile

TILE_TOKENS, TILE_WIDTH = 64, 64
EFFICIENCY = 0.6  # of the peak that dense products reach
BYTES = 2  # float16
# The plugin's forms of a routed layer, as plugins/tactics.py has them (a test holds them together).
TILED_LAUNCHES = 4  # clear, route, up, down; one more that sums where a token has several experts
GROUP_LAUNCHES, GROUP_FUSED_LAUNCHES = 2, 1  # of one expert a token: each program routes its group of tokens by itself
GROUP, GROUP_TILE, SCORED = 128, 16, 16  # tokens of a group, rows of its tiles, experts that are scored at a time
GROUP_UP = 64, 64  # tokens of a group, and neurons, that a program of `group16`'s first launch has
FUSED_TOKENS, FUSED_DIM = 16, 384  # tokens of a program of `group_fused`, and the widest tokens that it takes


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


def routed_ms(device: Profile, dim: int, widths: Sequence[int], load: Sequence[float], *, tokens: int, top_k: int) -> float:
    """Several experts of `widths` neurons, of which expert e gets `load[e]` (their sum is 1) of the tokens, in the fastest of the
    plugin's forms: TensorRT times them and keeps one."""
    counts = [share * tokens * top_k for share in load]
    hidden = BYTES * 2 * sum(count * width for count, width in zip(counts, widths, strict=True))
    moved = BYTES * (2 * tokens * dim + 2 * sum(widths) * dim) + hidden

    def macs(rows: int, groups: int = 1) -> float:
        """Of both maps, where each expert's tokens of each group fill whole tiles of `rows`."""
        tiles = [groups * math.ceil(count / groups / rows) for count in counts]
        padded = [math.ceil(width / TILE_WIDTH) * TILE_WIDTH for width in widths]
        return 2 * dim * rows * sum(tile * width for tile, width in zip(tiles, padded, strict=True))

    route = operation_ms(device, tokens * dim * len(widths), BYTES * tokens * dim, 2)
    forms = [route + operation_ms(device, macs(TILE_TOKENS), moved, TILED_LAUNCHES - 2 + (top_k > 1))]
    if top_k == 1:
        products = macs(GROUP_TILE, math.ceil(tokens / GROUP))
        scores = GROUP * math.ceil(len(widths) / SCORED) * SCORED * dim  # again in every program
        programs = math.ceil(tokens / GROUP_UP[0]) * math.ceil(max(widths) / GROUP_UP[1])
        forms.append(operation_ms(device, products + programs * scores, moved, GROUP_LAUNCHES))
        if dim <= FUSED_DIM:
            programs = math.ceil(tokens / FUSED_TOKENS) + len(widths)
            forms.append(operation_ms(device, products + programs * scores, moved - hidden, GROUP_FUSED_LAUNCHES))
    return min(forms)
