"""A model for images of another size than its own, rectangles included: what `--img-size` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moee.errors import UserError
from moee.models import MAX_SIDE, ModelSpec, build_model, plain_size
from moee.schema import reason_of


def sized(spec: ModelSpec, size: Sequence[int]) -> ModelSpec:
    """`spec` for images of `size`: height and width in pixels, or one number for both.

    A model whose constructor takes `img_size` gets it; for one that takes images of any size, a ConvNeXt, it is recorded as the
    size of the images. The model is laid out and run without memory, so a size that it cannot take is refused before any work.
    Raises `UserError` for such a size, and for a model that `build_model` refuses.
    """
    said = f"--img-size {' '.join(map(str, size))}"
    if len(size) not in (1, 2) or not all(1 <= side <= MAX_SIDE for side in size):
        raise UserError(f"{said}: expected height and width, or one number for both, from 1 to {MAX_SIDE} pixels")
    height, width = size[0], size[-1]
    change: dict[str, object] = {"kwargs": {**spec.kwargs, "img_size": plain_size((1, height, width))}}
    try:
        model = _laid_out(spec.model_copy(update=change))
    except UserError as error:
        if error.__cause__ is None:  # no such model
            raise
        if not isinstance(error.__cause__, TypeError) or "img_size" not in str(error.__cause__):
            raise UserError(f"{said}: {error}") from error
        change = {"input_size": (height, width)}
        model = _laid_out(spec.model_copy(update=change))
    _check(model, f"{said}: {spec.timm_name}", height, width)
    return spec.model_copy(update=change)


def _laid_out(spec: ModelSpec) -> nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return build_model(spec)


def _check(model: nn.Module, said: str, height: int, width: int) -> None:
    """Raise `UserError` if the patches do not divide the image, whose edge would be cut off, or the model does not run on it."""
    embed = getattr(model, "patch_embed", None)
    cut = getattr(embed, "proj", None)
    if isinstance(cut, nn.Conv2d) and cut.kernel_size == cut.stride and not getattr(embed, "dynamic_img_pad", False):
        rows, columns = cut.stride
        if height % rows or width % columns:
            raise UserError(f"{said} cuts images into patches of {rows} x {columns} pixels; give multiples of them")
    described: Any = model.pretrained_cfg
    try:
        with torch.no_grad():
            model(torch.empty(1, described["input_size"][0], height, width, device="meta"))
    except Exception as error:  # each model has its own
        reason = reason_of(error)
        raise UserError(f"{said} cannot take images of {height} x {width} pixels ({reason}); give another size") from error
