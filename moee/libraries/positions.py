"""Position embeddings of a file for a model of another image size, where the library has no filter of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

POSITIONS = re.compile(r"(.*\.)?(pos_embedding|position_embeddings|position_embedding\.weight)")


def resized_positions(state: Mapping[str, Tensor], model: nn.Module, prefix: int) -> dict[str, Tensor]:
    """`state` with square grids of position embeddings [1, N, D] or [N, D] resampled to the square grid of `model`'s, bicubically
    as timm does; the first `prefix` tokens are no patches. What cannot be resampled stays as it is."""
    expected = model.state_dict()
    result = dict(state)
    for name, tensor in state.items():
        wanted = expected.get(name)
        if wanted is None or tensor.shape == wanted.shape or not POSITIONS.fullmatch(name):
            continue
        if tensor.dim() != wanted.dim() or tensor.dim() not in (2, 3) or tensor.shape[-1] != wanted.shape[-1]:
            continue
        old, new = (t.shape[-2] - prefix for t in (tensor, wanted))
        sides = [math.isqrt(max(count, 0)) for count in (old, new)]
        if sides[0] ** 2 == old > 0 and sides[1] ** 2 == new > 0:
            grid = tensor if tensor.dim() == 3 else tensor[None]
            made = resample_abs_pos_embed(grid, [sides[1]] * 2, [sides[0]] * 2, num_prefix_tokens=prefix)
            result[name] = made if tensor.dim() == 3 else made[0]
    return result
