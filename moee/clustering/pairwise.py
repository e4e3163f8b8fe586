"""Squared distances by matrix products, with a proven lower bound, and exact distances of chosen pairs.

A matrix product gives |x|^2 + |y|^2 - 2 x.y, which loses digits to cancellation. `Bounds` therefore never claims a
distance: each entry it returns is a rigorous *lower bound* of the true squared distance, and `upper` turns that entry
into an upper bound. Whatever a decision needs beyond these intervals is recomputed by `exact_distances` in float64.

Error budget, for rows z (centred, scaled so that the largest norm is at most 1) held as h in the product's precision:
  rounding of the operands   2|z.z' - h.h'| <= (2r + r^2)(|z|^2 + |z'|^2)   with |z - h| <= r|z|, r measured over all rows
  the sum of K terms         gamma_K = K u / (1 - K u), any summation order (Higham 2002, section 3.1)
Both are relative to |z|^2 + |z'|^2, so shrinking the squared norms by their sum makes the product itself the bound.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

PAD = 32  # columns: keeps rows of every precision aligned to 64 bytes
TINY = 1e-28  # absolute slack of a squared distance (largest squared norm: 1); covers flushed subnormal numbers
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24}  # unit roundoff of the sums
# Relative rounding of an entry once stored: lists hold float32, whose own rounding the sum's gamma covers.
OUTPUT = {torch.float64: 2.0**-23, torch.float32: 0.0, torch.bfloat16: 2.0**-8}
NORM_PARTS = {torch.float64: 1, torch.float32: 1, torch.bfloat16: 3}  # 3 x 8 bits hold a 24-bit squared norm


@contextlib.contextmanager
def full_precision_products() -> Iterator[None]:
    """Forbid TF32 and bfloat16 inside float32 products, and reduced-precision sums in bfloat16 ones."""
    # Each flag is set back to what it was: PyTorch refuses to mix its old and new precision switches.
    matmul = torch.backends.cuda.matmul
    mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = (matmul.fp32_precision, mkldnn.fp32_precision, matmul.allow_bf16_reduced_precision_reduction)
    matmul.fp32_precision, mkldnn.fp32_precision = "ieee", "ieee"
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.fp32_precision, mkldnn.fp32_precision, matmul.allow_bf16_reduced_precision_reduction = before


def fast_dtype(device: torch.device, features: int) -> torch.dtype:
    """Precision of the first pass: bfloat16 where the CPU multiplies it natively, else float32.

    Below about 64 features the product is not what takes time, and float32's tighter bounds are worth more.
    """
    capable = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if capable and features >= 64 else torch.float32


@dataclass(frozen=True)
class Points:
    """Rows to cluster. `x` [M, F] float32 contiguous; `centre` [F] float64; `scale` a power of two."""

    x: Tensor
    centre: Tensor
    scale: float
    norms: Tensor  # [M] float64: squared norms of the centred, scaled rows

    @classmethod
    def of(cls, x: Tensor) -> Points:
        total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        for part in x.split(4096):
            total += part.double().sum(0)
        centre = total / len(x)
        norms = torch.cat([(part.double() - centre).square().sum(1) for part in x.split(4096)])
        largest = float(norms.max().sqrt())
        scale = 2.0 ** -int(torch.tensor(largest, dtype=torch.float64).frexp().exponent) if largest > 0 else 1.0
        return cls(x, centre, scale, norms * scale**2)

    def rows(self, index: slice | Tensor) -> Tensor:
        """Centred and scaled rows, float64 [n, F]."""
        return (self.x[index].double() - self.centre) * self.scale


class Bounds:
    """Lower bounds of squared distances between rows of `points`, in scaled units, from products in one dtype.

    `keep` holds the right-hand operand of every row ([M, F + 2..7 padded]); without it each block is made anew.
    """

    def __init__(self, points: Points, dtype: torch.dtype, keep: bool = True) -> None:
        self.points, self.dtype = points, dtype
        rows, features = points.x.shape
        self.width = -(-(features + 2 * NORM_PARTS[dtype]) // PAD) * PAD
        self.norms = points.norms
        unit = UNIT[dtype]
        gamma = self.width * unit / (1 - self.width * unit)
        ratio = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 0.0}[dtype]
        self.kept = None
        if keep:
            self.kept = torch.zeros((rows, self.width), dtype=dtype, device=points.x.device)
            measured = 0.0
            for start in range(0, rows, 4096):
                part = slice(start, start + 4096)
                z = points.rows(part)
                h = self.kept[part, :features] = z.to(dtype)
                if dtype != torch.bfloat16:
                    continue  # bfloat16 rounds away enough for measuring to pay: about half of the worst case
                lost = ((z - h.double()).norm(dim=1) / self.norms[part].sqrt()).where(self.norms[part] > TINY, 0.0)
                measured = max(measured, float(lost.max()) * (1 + 1e-6))
            ratio = min(ratio, measured) if dtype == torch.bfloat16 else ratio
        self.relative = (2 * ratio + ratio * ratio) + 2.1 * gamma + 8 * unit
        if self.kept is not None:
            self._append_norms(self.kept, slice(0, rows))

    def _make(self, index: slice | Tensor) -> Tensor:
        z = self.points.rows(index)
        block = z.new_zeros((len(z), self.width), dtype=self.dtype)
        block[:, : z.shape[1]] = z.to(self.dtype)
        self._append_norms(block, index)
        return block

    def _append_norms(self, block: Tensor, index: slice | Tensor) -> None:
        features, parts = self.points.x.shape[1], NORM_PARTS[self.dtype]
        rest = self.norms[index] * (1 - self.relative) - TINY
        for part in range(parts):
            piece = rest.to(self.dtype)
            block[:, features + part] = piece
            rest = rest - piece.double()
        block[:, features + parts : features + 2 * parts] = 1

    def right(self, index: slice | Tensor) -> Tensor:
        """Right-hand operand [n, width]: features, then the shrunk squared norm, then ones."""
        return self._make(index) if self.kept is None else self.kept[index]

    def left(self, index: slice | Tensor) -> Tensor:
        """Left-hand operand [n, width]: features times -2, then ones, then the shrunk squared norm."""
        right = self.right(index)
        features, parts = self.points.x.shape[1], NORM_PARTS[self.dtype]
        left = right.clone()
        left[:, :features] *= -2
        left[:, features : features + parts] = 1
        left[:, features + parts : features + 2 * parts] = right[:, features : features + parts]
        return left

    def lower(self, entries: Tensor) -> Tensor:
        """Proven lower bounds of the distance (float64, original units) for entries of a product."""
        squared = entries.double().clamp_min(0) * (1 - OUTPUT[self.dtype])
        return squared.sqrt() * ((1 - 1e-12) / self.points.scale)

    def upper(self, entries: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Proven upper bounds of the distance (float64, original units) for entries of pairs (i, j)."""
        squared = entries.double().abs() * (2 * OUTPUT[self.dtype]) + entries.double()
        squared = squared + 2.1 * self.relative * (self.norms[i] + self.norms[j]) + 4 * TINY
        return squared.clamp_min(0).sqrt() * ((1 + 1e-12) / self.points.scale)

    def reach(self, distance: Tensor) -> Tensor:
        """Entry value below which every pair at most `distance` (float64, original units) apart must lie."""
        squared = (distance * self.points.scale).square() * (1 + 4 * OUTPUT[self.dtype] + 1e-6) + 4 * TINY
        return squared.float()


def exact_distances(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Euclidean distances of the pairs (i, j), float64 [E], from float64 differences of the rows of x [M, F].

    The sum is a fixed binary tree of element-wise additions, so a pair's distance does not depend on the number of
    threads, on the device or on the pairs beside it.
    """
    if x.device.type != "cpu":
        parts = zip(i.split(1 << 14), j.split(1 << 14), strict=True)
        sums = [_tree_sum((x[a].double() - x[b].double()).square_()) for a, b in parts]
        return torch.cat(sums).sqrt_() if sums else x.new_zeros(0, dtype=torch.float64)
    # On the CPU: NumPy in plain threads, on chunks that stay in a core's cache. PyTorch would meet at a barrier after
    # each of these small steps, which costs a time slice whenever another process holds a core.
    rows, left, right = x.numpy(), i.numpy(), j.numpy()
    out = np.empty(len(left))
    size = max(1, (1 << 16) // rows.shape[1])

    def work(start: int) -> None:
        part = slice(start, start + size)
        d = rows[left[part]].astype(np.float64)
        d -= rows[right[part]].astype(np.float64)
        d *= d
        out[part] = _tree_sum(d)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, range(0, len(left), size)))
    return torch.from_numpy(np.sqrt(out))


def _tree_sum(d: Any) -> Any:
    """Sum over the second dimension of a tensor or array, which it overwrites, by halving."""
    width = d.shape[1]
    while width > 1:
        half = (width + 1) // 2
        d[:, : width - half] += d[:, half:width]
        width = half
    return d[:, 0]
