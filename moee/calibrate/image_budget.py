"""Which images a layer is fitted on: about as many as give it a number of tokens of its own.

Swin's first stage has 3,136 tokens an image, its last one 49. So layers are put into groups, in the order in which they run, and
each group gets images of its own number. A model whose layers all see as many tokens is one group, and so are layers whose tokens
become fewer little by little, where they merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moee.cures import without
from moee.errors import UserError
from moee.interface.watch import watched
from moee.parallel.ordered import PARTS, cut
from moee.tokens.block import merging_blocks

MERGING = 2.0  # times the images of a group that a layer may want and still be in it, where tokens merge from block to block


@dataclass(frozen=True)
class ImageGroup:
    """Layers that run one after another and want the same number of images."""

    names: tuple[str, ...]
    images: int


def tokens_an_image(model: nn.Module, dims: Mapping[str, int], image: Tensor) -> dict[str, int]:
    """Tokens that each named layer of width `dims` sees of one `image` [1, C, H, W], in the order in which the layers run.

    Raises `UserError` for a layer that takes no part in the forward pass."""
    counts: dict[str, int] = {}
    with watched(model, dims, lambda name, x: counts.__setitem__(name, x.numel() // dims[name])), torch.no_grad():
        model(image)
    for name in dims:
        if not counts.get(name):
            raise UserError(f"`{name}` takes no part in the forward pass; {without(name)}")
    return counts


def likeness(model: nn.Module) -> float:
    """What `image_groups` is to take for alike: in a model that merges tokens every layer wants another number of images."""
    return MERGING if merging_blocks(model) else 1.0


def image_groups(
    counts: Mapping[str, int], images: int, tokens: int, least: int = 1, *, alike: float = 1.0
) -> list[ImageGroup]:
    """Layers with `counts` tokens an image, in groups that want about `tokens` tokens: `least` to `images` images. A layer that
    wants at most `alike` times as many images as the group before it is content with the images of that group."""
    groups: list[ImageGroup] = []
    for name, count in counts.items():
        wanted = min(images, max(least, tokens // count))
        if groups and groups[-1].images <= wanted <= alike * groups[-1].images:
            groups[-1] = ImageGroup((*groups[-1].names, name), groups[-1].images)
        else:
            groups.append(ImageGroup((name,), wanted))
    return groups


def spread(images: int, wanted: int) -> Tensor:
    """`wanted` positions spread evenly over a data set of `images` images, ascending."""
    return torch.linspace(0, images - 1, wanted).round().long().unique()


def spread_parts(images: int, wanted: int, parts: int = PARTS) -> list[Tensor]:
    """Positions of `wanted` images spread evenly over a data set of `images` images, in `parts` runs at most."""
    order = spread(images, wanted)
    return [order[run.start : run.stop] for run in cut(len(order), parts)]
