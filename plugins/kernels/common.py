"""Device functions that several kernels share: tile look-up, activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from plugins.contract import ACTIVATIONS

LOOKUP = tl.constexpr(64)


REFERENCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v),
}


def activate_reference(value: torch.Tensor, activation: int) -> torch.Tensor:
    """`value` any shape, any float type; `activation` an index into `contract.ACTIVATIONS`, `ValueError` for another."""
    if not 0 <= activation < len(ACTIVATIONS):
        raise ValueError(f"activation must be an index into {ACTIVATIONS}, got {activation}")
    return REFERENCES[ACTIVATIONS[activation]](value)


@triton.jit
def activate(value, activation):
    """Float32 block in, float32 block out. `activation` is the same for all programs, so the branch costs one test.

    A code that the contract lacks gives NaN, never another function; `dispatch` and the plugin refuse it before a launch.
    """
    if activation == 0:
        result = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif activation == 2:
        # Not maximum(value, 0): that would turn a NaN into 0.
        result = tl.where(value < 0.0, 0.0, value)
    else:
        # x sigmoid(s x) for all others. Their code is shared: one more function of its own cost registers.
        slope = tl.where(activation == 3, 1.0, tl.where(activation == 4, 1.702, float("nan")))
        inner = slope * value
        if activation == 1:
            # tanh(z) = 2 sigmoid(2z) - 1, so 0.5 (1 + tanh z) = sigmoid(2z).
            inner = 1.5957691216057308 * (value + 0.044715 * value * value * value)
        result = value * tl.sigmoid(inner)
    return result


@triton.jit
def find_tile(pid, counts, experts, BM: tl.constexpr):
    """Which expert and which of its row tiles program `pid` works on.

    Tiles are numbered expert by expert. Returns (expert, first row in its bucket, rows in its bucket, whether `pid`
    has work). The grid is an upper bound, so the last programs have none.
    """
    column = tl.arange(0, LOOKUP)
    before = pid * 0
    expert = pid * 0
    first = pid * 0
    for k in range(0, experts, LOOKUP):
        count = tl.load(counts + k + column, mask=k + column < experts, other=0)
        tiles = (count + BM - 1) // BM
        ends = before + tl.cumsum(tiles, 0)
        passed = ends <= pid
        expert += tl.sum(passed.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(passed, ends, 0), 0))
        before += tl.sum(tiles, 0)
    busy = pid < before
    expert = tl.minimum(expert, experts - 1)
    return expert, (pid - first) * BM, tl.load(counts + expert), busy


@triton.jit
def round16(value):
    """Next multiple of 16, in a form from which the compiler sees the divisibility."""
    return (value + 15) // 16 * 16
