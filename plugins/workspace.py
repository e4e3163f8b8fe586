"""The plugin's workspace: which buffers, in what order, how many bytes. plugins/csrc mirrors this arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from plugins.tactics import TACTICS, Tactic

ALIGNMENT = 256
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "uint8": torch.uint8,
}


def round_up(value: int, unit: int) -> int:
    """Next multiple of `unit`."""
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call: T tokens, D dim, K experts, U union_size, widest expert, experts a token."""

    tokens: int
    dim: int
    experts: int
    union_size: int
    max_width: int
    top_k: int = 1

    def as_dict(self) -> dict[str, int]:
        return dict(vars(self))


@dataclass(frozen=True)
class Buffer:
    """One workspace buffer: offset and size in bytes, element type, shape."""

    name: str
    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Workspace:
    """All buffers of one tactic. Bytes [0, zeroed) must be zero before the first launch; `size` is the total."""

    buffers: tuple[Buffer, ...]
    zeroed: int
    size: int

    def split(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of `memory` (uint8, at least `size` long), one a buffer."""
        views = {}
        for b in self.buffers:
            views[b.name] = memory[b.offset : b.offset + b.size].view(TORCH_DTYPES[b.dtype]).view(b.shape)
        return views


KINDS = ("tile", "fused", "masked", "group", "group_fused")


def layout(sizes: Sizes, dtype: str, kind: str) -> Workspace:
    """Workspace of a tactic of `kind`, one of KINDS, for token type `dtype`.

    Order: counts, member, buckets, routes, hidden, partial; each start a multiple of 256 bytes. The group kinds count nothing.
    Raises `ValueError` for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of tactic {kind!r}; expected one of {', '.join(KINDS)}")
    s = sizes
    slots = s.tokens * s.top_k
    wanted: list[tuple[str, str, tuple[int, ...]]] = []
    if not kind.startswith("group"):
        wanted.append(("counts", "int32", (s.experts,)))
        if kind == "masked":
            wanted.append(("member", "uint8", (s.experts, s.union_size)))
        wanted.append(("buckets", "int32", (s.experts, s.tokens)))
    wanted.append(("routes", "int32", (slots,)))
    if kind == "masked":
        wanted.append(("hidden", dtype, (s.tokens, round_up(s.union_size, 16))))
    else:
        if kind in ("tile", "group"):
            wanted.append(("hidden", dtype, (slots, round_up(s.max_width, 16))))
        if s.top_k > 1 and not kind.startswith("group"):
            wanted.append(("partial", "float32", (slots, s.dim)))

    buffers: list[Buffer] = []
    offset = 0
    for name, element, shape in wanted:
        size = TORCH_DTYPES[element].itemsize * prod(shape)
        buffers.append(Buffer(name, offset, size, element, shape))
        offset = round_up(offset + size, ALIGNMENT)
    first_unzeroed = next(b for b in buffers if b.name not in ("counts", "member"))
    return Workspace(tuple(buffers), first_unzeroed.offset, offset)


def bytes_needed(sizes: Mapping[str, int], dtype: str, tactics: Sequence[Tactic] = TACTICS) -> int:
    """Most that any of `tactics` needs for up to `sizes`' tokens, which is what the plugin asks TensorRT for.

    A tactic with a limit of tokens never runs above it, so it needs no more than at that limit.
    """
    most = Sizes(**sizes)
    return max(layout(replace(most, tokens=t.most_tokens(most.tokens)), dtype, t.kind).size for t in tactics)
