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
from dataclasses import dataclass

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
        ratio = self._rounding()
        self.relative = (2 * ratio + ratio * ratio) + 2.1 * gamma + 8 * unit
        self.kept = torch.cat([self._make(slice(s, s + 4096)) for s in range(0, rows, 4096)]) if keep else None

    def _rounding(self) -> float:
        """Largest |z - h| / |z| over the rows. Measured for bfloat16, where it is about half of the worst case."""
        if self.dtype != torch.bfloat16:
            return 2.0**-24 if self.dtype == torch.float32 else 0.0
        ratio = 0.0
        for start in range(0, len(self.norms), 4096):
            z = self.points.rows(slice(start, start + 4096))
            lost = (z - z.to(self.dtype).double()).norm(dim=1)
            norm = self.norms[start : start + 4096].sqrt()
            ratio = max(ratio, float((lost / norm).where(norm > TINY**0.5, 0.0).max()))
        return ratio * (1 + 1e-6)

    def _make(self, index: slice | Tensor) -> Tensor:
        z = self.points.rows(index)
        block = z.new_zeros((len(z), self.width), dtype=self.dtype)
        features, parts = z.shape[1], NORM_PARTS[self.dtype]
        block[:, :features] = z.to(self.dtype)
        rest = self.norms[index] * (1 - self.relative) - TINY
        for part in range(parts):
            piece = rest.to(self.dtype)
            block[:, features + part] = piece
            rest = rest - piece.double()
        block[:, features + parts : features + 2 * parts] = 1
        return block

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


def exact_distances(x: Tensor, i: Tensor, j: Tensor, chunk: int = 256) -> Tensor:
    """Euclidean distances of the pairs (i, j), float64 [E], from float64 differences of the rows of x [M, F].

    The sum is a fixed binary tree of element-wise additions, so a pair's distance does not depend on the number of
    threads, on the device or on the pairs beside it.
    """
    out = torch.empty(len(i), dtype=torch.float64, device=x.device)
    for start in range(0, len(i), chunk):
        part = slice(start, start + chunk)
        d = x[i[part]].double().sub_(x[j[part]].double())
        d.mul_(d)
        width = d.shape[1]
        while width > 1:
            half = (width + 1) // 2
            d[:, : width - half] += d[:, half:width]
            width = half
        out[part] = d[:, 0]
    return out.sqrt_()
