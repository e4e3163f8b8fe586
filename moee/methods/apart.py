"""Whether an image's output is the image's own: the same alone as in a batch, and the same again.

Every figure takes that for granted: accuracy and cosines are measured in batches of one size, experts calibrated in another, and
a device runs what comes. A model whose normalisation takes the statistics of its batch has no output of an image at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from moee.errors import UserError
from moee.interface.adapted import bare, title_of_model
from moee.methods.identity import dense_output, output_of_batch, worst
from moee.mlps.find import grouped
from moee.mlps.proof import random_images
from moee.schema import reason_of

ROOM = 100  # times the dense model's own noise (see `identity.NOISE`); 2.4 was the most of 55 models of three libraries
ALONE = "a device would give other answers than were measured"


@torch.no_grad()
def check_apart(model: nn.Module, images: Tensor) -> None:
    """Raise `UserError` unless `model` gives for each of `images` [B, C, H, W], beside a random one that differs from them, what
    it gives for that image alone, to a bound from the type, and gives it every time. `model` stays as it is. Takes the forward
    passes of 3 B + 4 images."""
    title, first = title_of_model(model), images[:1]
    channels, height, width = images.shape[1:]
    images = torch.cat([images, random_images((channels, height, width), images)[:1]])
    with _explained(model, f"images of {channels} x {height} x {width}"):
        dense, bound = dense_output(model, images, ROOM)
    with _explained(model, "one image alone"):
        parts = [output_of_batch(model, image) for image in images.split(1)]
    size = float(dense.float().square().mean().sqrt())
    again = worst((output_of_batch(model, first) - parts[0]).abs())
    if not again <= ROOM * torch.finfo(dense.dtype).eps * size:
        raise UserError(
            f"{title} gives another output each time for the same image, {_share(again, size)} apart: something in it is drawn "
            "at random or counts its runs, such as a dropout that eval() does not reach; take that out, nothing could be compared"
        )
    apart = worst((torch.cat(parts) - dense).abs())
    if not apart <= bound:
        raise UserError(
            f"{title}'s output of an image depends on the other images of its batch: alone it is off by {_share(apart, size)}"
            f"{_statistics(model)}; {ALONE}"
        )


@contextmanager
def _explained(model: nn.Module, on: str) -> Iterator[None]:
    """What the model's forward raises, as a `UserError`: any code may stand behind it."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{title_of_model(model)} does not run on {on} ({reason_of(error)}){_statistics(model)}") from error


def _share(difference: float, size: float) -> str:
    return f"{100 * difference / max(size, torch.finfo(torch.float32).tiny):.3g} % of the output's size"


def _statistics(model: nn.Module) -> str:
    """A clause about norms that take the statistics of what they are given."""
    names = [
        name for name, part in bare(model).named_modules()
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None)
    ]  # fmt: skip
    if not names:
        return ""
    verb = "takes" if len(names) == 1 else "take"
    return f"; {grouped(names)} {verb} the statistics of the batch: give it running statistics and eval mode"
