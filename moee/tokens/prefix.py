"""What tokens that are no patches count for in a fit: a class token is one of many tokens, and most of what a model returns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moee.tokens.block import merging_blocks

PREFIX_SHARE = 1 / 8  # of an image's patches, that each of them counts for


def prefix_tokens(model: nn.Module) -> int:
    """Tokens of an image, the first ones, that are no patches; 0 where it does not say, or returns an average."""
    if getattr(model, "global_pool", "token") not in ("token", ""):
        return 0
    return int(getattr(model, "num_prefix_tokens", 0) or 0)


def holds_prefix(model: nn.Module, count: int) -> bool:
    """Whether `count` tokens of an image can hold those that are no patches: CaiT's and XCiT's blocks see the patches alone.
    Where tokens merge, their number says nothing."""
    return bool(merging_blocks(model)) or count != getattr(getattr(model, "patch_embed", None), "num_patches", None)


def token_weights(count: int, prefix: int) -> Tensor:
    """What each of an image's `count` tokens [count] counts for; 1 for a patch."""
    weights = torch.ones(count)
    weights[:prefix] = max(1.0, (count - prefix) * PREFIX_SHARE)
    return weights
