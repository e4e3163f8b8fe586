"""What a kernel file exports besides its reference and its kernel: argument types, grid and role."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Pointer arguments and the type they point to; `T` is the token type. The names are those of plugins/contract.py plus
# the workspace buffers of plugins/workspace.py.
POINTERS: dict[str, str] = {
    "x": "T",
    "router": "T",
    "router_bias": "float32",
    "w_up": "T",
    "b_up": "T",
    "w_down": "T",
    "b_out": "T",
    "neurons": "int32",
    "offsets": "int32",
    "y": "T",
    "counts": "int32",
    "member": "uint8",
    "buckets": "int32",
    "routes": "int32",
    "hidden": "T",
    "partial": "float32",
    "load_cdf": "int32",
}
SCALARS: tuple[str, ...] = ("tokens", "dim", "experts", "union_size", "max_width", "top_k", "activation", "by_load")

# Scalars that Triton must not turn into constants or divisibility hints of their own: one binary serves every value.
# `dim` is left out because the operator promises a multiple of 16.
RUNTIME: list[str] = ["tokens", "experts", "union_size", "max_width", "top_k", "activation", "by_load"]

# How each grid axis follows from the shapes; plugins/csrc mirrors this table.
AXES: dict[str, Callable[[Mapping[str, int], int, int], int]] = {
    "one": lambda s, m, n: 1,
    "token_tiles": lambda s, m, n: -(-s["tokens"] // m),
    "slot_tiles": lambda s, m, n: -(-s["tokens"] * s["top_k"] // m),
    "expert_tiles": lambda s, m, n: -(-s["tokens"] * s["top_k"] // m) + s["experts"],
    "width_tiles": lambda s, m, n: -(-s["max_width"] // n),
    "union_tiles": lambda s, m, n: -(-s["union_size"] // n),
    "dim_tiles": lambda s, m, n: -(-s["dim"] // n),
}


@dataclass(frozen=True)
class Block:
    """Tile of one program: m rows (tokens), n output columns, k columns of the inner product."""

    m: int
    n: int
    k: int


@dataclass(frozen=True)
class KernelSpec:
    """One kernel. `fn` is the `triton.jit` function, `reference` does the same on CPU tensors in place."""

    role: str
    fn: Any
    reference: Callable[..., None]
    grid: tuple[str, str, str]

    @property
    def arguments(self) -> tuple[str, ...]:
        """Run-time arguments in order, without the compile-time constants."""
        return tuple(p.name for p in self.fn.params if not p.is_constexpr)

    def launch_grid(self, sizes: Mapping[str, int], block: Block) -> tuple[int, int, int]:
        """Programs an axis for the given sizes; every axis at least 1."""
        x, y, z = (max(1, AXES[axis](sizes, block.m, block.n)) for axis in self.grid)
        return x, y, z


def check_arguments(spec: KernelSpec) -> None:
    """Raises ValueError if the kernel takes an argument that the operator does not have."""
    unknown = [a for a in spec.arguments if a not in POINTERS and a not in SCALARS]
    if unknown:
        raise ValueError(f"kernel {spec.role} takes {unknown}; known arguments are {[*POINTERS, *SCALARS]}")
