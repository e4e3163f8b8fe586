"""Inputs for the kernel tests: random operators of given sizes, and the comparison with float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def operator(
    tokens: int, dim: int, widths: Sequence[int], union: int, dtype: str, seed: int = 0, spread: float = 1.0
) -> dict[str, torch.Tensor]:
    """Inputs of plugins/contract.py: one expert a width, each with `width` of `union` neurons, overlapping."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    kept = [torch.randperm(union, generator=generator)[:w].sort().values for w in widths]
    experts = len(widths)
    offsets = torch.tensor([0, *torch.tensor([len(k) for k in kept]).cumsum(0).tolist()], dtype=torch.int32)
    t = DTYPES[dtype]
    return {
        "x": normal(tokens, dim).to(t),
        "router": (spread * normal(experts, dim)).to(t),
        "router_bias": normal(experts),
        "w_up": (normal(union, dim) / dim**0.5).to(t),
        "b_up": normal(union).to(t),
        "w_down": (normal(union, dim) / union**0.5).to(t),
        "b_out": normal(experts, dim).to(t),
        "neurons": torch.cat(kept).int(),
        "offsets": offsets,
    }


def bound(y: torch.Tensor, dtype: str) -> torch.Tensor:
    """Allowed absolute error against float64: rounding of the hidden values and of the output, element by element.

    The hidden values are rounded once (relative 2^-p each, at random), the output once; 8 units in the last place of
    the row's magnitude leave room for the sum without hiding a wrong neuron or bias.
    """
    unit = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    return 8 * unit * (1 + y.abs().amax(1, keepdim=True))


def poison(memory: torch.Tensor) -> torch.Tensor:
    """Fill uint8 memory with 0xFF: NaN in every float type, -1 in every integer type."""
    return memory.fill_(255)
