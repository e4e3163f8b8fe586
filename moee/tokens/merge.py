"""Bipartite soft matching of tokens (ToMe, Bolya et al., ICLR 2023, section 3): which patches merge, and what they become.

The patches of an image stand in two sets, those at even and those at odd places. Each patch of the first set has a best one in
the second, by the cosine of the attention's keys, averaged over the heads. The patches of the first set whose best one is most
alike merge into it, by a mean weighted by how many patches each stands for. Class and register tokens stand apart. Of equal
cosines the lower place comes first.

Every shape is fixed by the number of tokens, so that a graph has no data-dependent sizes. Places are float32 where they are
computed with, which holds them exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Choice(NamedTuple):
    """What a matching says of the first set's patches. `order` [B, A]: their places, those that merge first; `best` [B, A]: the
    place in the second set of the one that each is most like."""

    order: Tensor
    best: Tensor


class Merged(NamedTuple):
    """Tokens `x` [B, N, D] on their way through merging blocks. `size` [B, N]: how many tokens of the image each stands for, None
    for one each. `place` [B, P]: where each of the image's P patches is among the N, class and register tokens not counted; None
    for its own place."""

    x: Tensor
    size: Tensor | None = None
    place: Tensor | None = None


def exact(x: Tensor) -> torch.dtype:
    """The type in which matchings are computed: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


class TokenMerge(nn.Module):
    """Merges `merged` patches of every image. `weight` [d, D] and `bias` [d] give the mean over the heads of the keys of a token;
    the first `prefix` tokens never merge."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, merged: int, prefix: int):
        super().__init__()
        self.merged, self.prefix = merged, prefix
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", bias.detach().clone())

    def scores(self, h: Tensor) -> Tensor:
        """Cosines [B, A, C] of the first set's patches with the second's, of the attention's input h [B, N, D]."""
        dtype = exact(h)
        keys = nn.functional.linear(h[:, self.prefix :].to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        keys = nn.functional.normalize(keys, dim=-1)
        return keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)

    def choose(self, h: Tensor) -> Choice:
        """The matching of the attention's input h [B, N, D]."""
        likeness, best = self.scores(h).max(-1)
        return Choice(torch.sort(likeness, dim=1, descending=True, stable=True).indices, best)

    def forward(self, h: Tensor, given: Merged) -> Merged:
        """The tokens `given`, after the attention that read h [B, N, D], with `merged` fewer: prefix, first set, second set."""
        x, prefix = given.x, self.prefix
        order, best = self.choose(h)
        dtype = exact(h)
        firsts, seconds = order.shape[1], x.shape[1] - prefix - order.shape[1]
        stays = firsts - self.merged
        source = order[:, : self.merged]
        kept = order[:, self.merged :].to(dtype).sort(dim=1, stable=True).values.long()
        columns = torch.arange(seconds, device=x.device)
        into = (best.gather(1, source)[:, None] == columns[:, None]).to(dtype)  # [B, seconds, merged]
        size = torch.ones_like(x[..., 0], dtype=dtype) if given.size is None else given.size
        patches, sizes = x[:, prefix:], size[:, prefix:]
        first, second, own = patches[:, ::2], patches[:, 1::2], sizes[:, 1::2]
        brought = into * sizes[:, ::2].gather(1, source)[:, None]
        total = own + brought.sum(-1)
        mean = second * (own / total)[..., None].to(x.dtype) + (brought / total[..., None]).to(x.dtype) @ rows(first, source)
        places = torch.arange(firsts, device=x.device)
        below = (source[..., None] < places).to(dtype).sum(1)  # of the merged ones, how many stand before each
        goes = (source[..., None] == places).to(dtype).sum(1)
        moved = torch.where(goes > 0, best + stays, (places - below).long())
        second_moved = (columns + stays).expand(x.shape[0], -1)
        now = torch.stack([moved[:, :seconds], second_moved], -1).flatten(1)
        now = torch.cat([now, moved[:, seconds:]], 1)
        return Merged(
            torch.cat([x[:, :prefix], rows(first, kept), mean], 1),
            torch.cat([size[:, :prefix], sizes[:, ::2].gather(1, kept), total], 1),
            now if given.place is None else now.gather(1, given.place),
        )


def rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows `index` [B, K] of x [B, N, D]: [B, K, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def restored(given: Merged, prefix: int) -> Tensor:
    """Every patch of the image at its own place again [B, prefix + P, D], with what the token that holds it has become."""
    if given.place is None:
        return given.x
    return torch.cat([given.x[:, :prefix], rows(given.x[:, prefix:], given.place)], 1)
