"""The closed form behind narrower heads: which directions of queries, keys and values the data needs.

Per head, with q and k [tokens, d] (k centred over an image's tokens, a constant that a softmax does not see), the error of the
dot products E (q.k - q'.k')^2 is least, for q and k drawn independently, with the leading singular vectors of
Cq^(1/2) Ck^(1/2), C being second moments. Values: the leading ones of P Cv^(1/2), P the head's part of the output projection
behind its LayerScale, Cv the covariance of what the head attends to. The output projection is then fitted by least squares to
the dense attention's output on the narrowed model's own inputs, front to back. The few tokens that are no patches (a class token
first of all) stand for much of the output and count for more in the sums over queries and outputs: each for PREFIX_SHARE of the
patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from timm.layers import Attention
from torch import Tensor, nn

from moee.calibrate.ridge import solve_ridge
from moee.mlps.attention import NarrowAttention, Widths
from moee.tokens.prefix import token_weights

BATCH = 16  # images a product
RIDGE = 1e-6  # of the mean diagonal: the fit has hundreds of tokens a weight, this is for rank-deficient values only
FLOOR = 1e-8  # of the largest eigenvalue


SUMS = ("query", "key", "read", "total", "count")


class HeadMoments:
    """Second moments of an attention's queries and keys [heads, d, d], mean and covariance of what its projection reads.

    The first `prefix` tokens of an image are no patches."""

    def __init__(self, attention: Attention, prefix: int = 0):
        heads, dim = attention.num_heads, attention.head_dim
        self.attention, self.prefix = attention, prefix
        device = attention.qkv.weight.device
        self.query = torch.zeros(heads, dim, dim, dtype=torch.float64, device=device)
        self.key = torch.zeros_like(self.query)
        self.read = torch.zeros(heads * dim, heads * dim, dtype=torch.float64, device=device)
        self.total = torch.zeros(heads * dim, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x: Tensor) -> Tensor:
        """See tokens [B, N, D]; returns what the output projection reads of them, [B N, heads * d]."""
        q, k, read = dense_parts(self.attention, x)
        weight = token_weights(x.shape[1], self.prefix).to(x.device)
        k = k - k.mean(2, keepdim=True)
        self.query += torch.einsum("bhnd,bhne->hde", q * weight[:, None], q)
        self.key += torch.einsum("bhnd,bhne->hde", k, k)
        weighed = read * weight.repeat(len(x))[:, None]
        self.read += weighed.T @ read
        self.total += weighed.sum(0)
        self.count += weight.sum() * len(x)
        return read

    def sums(self) -> dict[str, Tensor]:
        """What was summed, by name."""
        return {name: getattr(self, name) for name in SUMS}

    def put(self, sums: Mapping[str, Tensor]) -> None:
        """Take `sums` of more images in the place of what was seen."""
        for name in SUMS:
            getattr(self, name).copy_(sums[name])

    @property
    def covariance(self) -> Tensor:
        mean = self.total / self.count
        return self.read / self.count - torch.outer(mean, mean)


def dense_parts(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key [B, heads, N, d] of tokens [B, N, D], and what the output projection reads, [B N, heads * d]."""
    images, count = x.shape[:2]
    q, k, v = attention.qkv(x).view(images, count, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    seen = nn.functional.scaled_dot_product_attention(q, k, v)
    return q, k, seen.transpose(1, 2).reshape(images * count, -1)


def _roots(second: Tensor) -> tuple[Tensor, Tensor]:
    """C^(1/2) and C^(-1/2) of symmetric matrices [..., d, d]."""
    values, vectors = torch.linalg.eigh(second)
    values = values.clamp(min=FLOOR * float(values.max().clamp(min=1e-30))).sqrt().unsqueeze(-2)
    return vectors * values @ vectors.mT, vectors / values @ vectors.mT


@dataclass(frozen=True)
class Bases:
    """Maps [heads, d, d] of a head's query, key and value to coordinates in which the leading ones matter most."""

    query: Tensor
    key: Tensor
    value: Tensor


def find_bases(moments: HeadMoments, scale: Tensor | None) -> Bases:
    """The best coordinates; `scale` [D] is the LayerScale behind the attention."""
    attention = moments.attention
    heads, dim = attention.num_heads, attention.head_dim
    query, query_inverse = _roots(moments.query / moments.count)
    key, key_inverse = _roots(moments.key / moments.count)
    left, strength, right = torch.linalg.svd(query @ key)
    root = strength.sqrt().unsqueeze(-1)
    diagonal = moments.covariance.view(heads, dim, heads, dim).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    value, value_inverse = _roots(diagonal)
    weight = attention.proj.weight.double()
    weight = weight if scale is None else weight * scale.double()[:, None]
    # the right singular vectors of W C^(1/2), from a square matrix: W has more rows than a head has dimensions
    by_head = weight.view(-1, heads, dim).transpose(0, 1) @ value
    directions = torch.linalg.eigh(by_head.mT @ by_head).eigenvectors.flip(-1)
    return Bases(root * left.mT @ query_inverse, root * right @ key_inverse, directions.mT @ value_inverse)


def narrowed(attention: Attention, bases: Bases, widths: Widths, moments: HeadMoments) -> NarrowAttention:
    """`attention` with `widths` a head; its output projection is the least-squares one for what the moments saw."""
    heads, dim = attention.num_heads, attention.head_dim
    weight = attention.qkv.weight.double().view(3, heads, dim, -1)
    bias = attention.qkv.bias
    offset = weight.new_zeros(3, heads, dim) if bias is None else bias.double().view(3, heads, dim)
    query, key, value = bases.query[:, : widths.qk] * attention.scale, bases.key[:, : widths.qk], bases.value[:, : widths.v]
    made = NarrowAttention(weight.shape[-1], heads, dim, widths).to(weight.device)
    pairs = [(made.q, query, 0), (made.k, key, 1), (made.v, value, 2)]
    for linear, basis, part in pairs:
        linear.weight.data = (basis @ weight[part]).flatten(0, 1).float()
        if linear.bias is not None:
            linear.bias.data = (basis @ offset[part].unsqueeze(-1)).flatten().float()
    reduce = torch.block_diag(*value)
    covariance, mean = moments.covariance, moments.total / moments.count
    dense = attention.proj.weight.double()
    fitted = solve_ridge(reduce @ covariance @ reduce.T, reduce @ covariance @ dense.T, RIDGE)[0].T
    made.proj.weight.data = fitted.float()
    own = 0 if attention.proj.bias is None else attention.proj.bias.double()
    made.proj.bias.data = (own + dense @ mean - fitted @ (reduce @ mean)).float()
    return made.eval()


def projection_sums(
    made: NarrowAttention, attention: Attention, x: Tensor, prefix: int = 0, *, reads: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Sums over tokens [B, N, D] from which `made.proj` is fitted to the dense `attention`'s output. `reads`: what its projection
    reads of each `BATCH` of images, where that is known (`HeadMoments.add`)."""
    width, dim = made.proj.in_features, made.proj.out_features
    exact = torch.zeros(0, dtype=torch.float64, device=x.device)
    weights = token_weights(x.shape[1], prefix).to(x.device)
    sums = {
        "gram": exact.new_zeros(width, width), "cross": exact.new_zeros(width, dim), "read": exact.new_zeros(width),
        "target": exact.new_zeros(dim), "count": weights.sum().double() * len(x),
    }  # fmt: skip
    for number, part in enumerate(x.split(BATCH)):
        read = made.attend(part).flatten(0, 1)
        target = attention.proj(dense_parts(attention, part)[2] if reads is None else reads[number])
        weight = weights.repeat(len(part))[:, None]
        weighed = read * weight
        sums["gram"] += weighed.T @ read
        sums["cross"] += weighed.T @ target
        sums["read"] += weighed.sum(0, dtype=torch.float64)
        sums["target"] += (target * weight).sum(0, dtype=torch.float64)
    return sums


def fit_projection(made: NarrowAttention, sums: Mapping[str, Tensor]) -> None:
    """Fit `made.proj` by least squares on what was summed (`projection_sums`)."""
    read, target = sums["read"] / sums["count"], sums["target"] / sums["count"]
    gram = sums["gram"] / sums["count"] - torch.outer(read, read)
    cross = sums["cross"] / sums["count"] - torch.outer(read, target)
    fitted = solve_ridge(gram, cross, RIDGE)[0].T
    made.proj.weight.data = fitted.float().contiguous()
    made.proj.bias.data = (target - fitted @ read).float()
