"""The tokens that lie nearest an expert's router row, kept while a model runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


class NearestTokens:
    """Of every expert of a layer, the tokens of highest cosine to its router row, of those that it gets; one an image, since the
    neighbours of a patch would only repeat it.

    `rows` [K, D] are the router's; at most `count` tokens an expert are kept.
    """

    def __init__(self, rows: Tensor, count: int):
        self.rows = normalize(rows.detach().float(), dim=1)
        self.cosines = torch.full((len(rows), count), -torch.inf)
        self.images = torch.zeros(len(rows), count, dtype=torch.int64)
        self.tokens = torch.zeros(len(rows), count, dtype=torch.int64)

    def add(self, tokens: Tensor, routes: Tensor, images: Tensor) -> None:
        """tokens [B, T, D] of the images numbered `images` [B], and the experts `routes` [B, T, top_k] that they took."""
        near = normalize(tokens.float(), dim=-1) @ self.rows.T
        gets = torch.zeros_like(near, dtype=torch.bool).scatter_(-1, routes, True)
        best, token = near.masked_fill(~gets | ~near.isfinite(), -torch.inf).max(1)  # [B, K]
        cosines = torch.cat([self.cosines, best.T], 1)
        chosen = cosines.sort(dim=1, descending=True, stable=True).indices[:, : self.cosines.shape[1]]
        self.images = torch.cat([self.images, images.expand(len(self.rows), -1)], 1).gather(1, chosen)
        self.tokens = torch.cat([self.tokens, token.T], 1).gather(1, chosen)
        self.cosines = cosines.gather(1, chosen)

    def places(self, count: int) -> list[list[tuple[int, int, float]]]:
        """An expert's nearest `count` tokens or fewer, nearest first: (image, token, cosine)."""
        found = []
        for images, tokens, cosines in zip(self.images.tolist(), self.tokens.tolist(), self.cosines.tolist(), strict=True):
            kept = [place for place in zip(images, tokens, cosines, strict=True) if place[2] > -torch.inf]
            found.append(kept[:count])
        return found
