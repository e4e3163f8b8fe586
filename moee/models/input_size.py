"""A model for images of another size than its own, rectangles included: what `--img-size` does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moee.config import MAX_SIDE
from moee.errors import MissingDependency, UserError
from moee.interface.adapted import AdaptedModel
from moee.models.ffn import plain_size
from moee.models.model import LIBRARIES, ModelSpec, build_model
from moee.schema import reason_of

VALUES = re.compile(r"\bmeta\b.*\bnumpy\b|\bon meta tensors\b|\bdata out of meta\b|\bmeta tensor", re.IGNORECASE)
OF_SIZE = re.compile(r"\b(height|width|img_size|(image|input|kernel) size)\b", re.IGNORECASE)


def sized(spec: ModelSpec, size: Sequence[int]) -> ModelSpec:
    """`spec` for images of `size`: height and width in pixels, or one number for both.

    A model whose constructor takes the size gets it; for one that takes images of any size, a ConvNeXt, it is recorded as the
    size of the images. The model is laid out and run without memory, so a size that it cannot take is refused before any work.
    Raises `UserError` for such a size, and for a model that `build_model` refuses.
    """
    said = f"--img-size {' '.join(map(str, size))}"
    if len(size) not in (1, 2) or not all(1 <= side <= MAX_SIDE for side in size):
        raise UserError(f"{said}: expected height and width, or one number for both, from 1 to {MAX_SIDE} pixels")
    height, width = size[0], size[-1]
    change = (_told_timm if spec.library == "timm" else _told_other)(spec, said, height, width)
    model = _laid_out(spec.model_copy(update=change))
    _check(model, f"{said}: {spec.called}", height, width, spec)
    return spec.model_copy(update=change)


def _told_timm(spec: ModelSpec, said: str, height: int, width: int) -> dict[str, Any]:
    """timm's models take the argument `img_size` unless any size will do."""
    change: dict[str, Any] = {"kwargs": {**spec.kwargs, "img_size": plain_size((1, height, width))}}
    try:
        _laid_out(spec.model_copy(update=change))
    except UserError as error:
        if error.__cause__ is None:  # no such model
            raise
        if not isinstance(error.__cause__, TypeError) or "img_size" not in str(error.__cause__):
            raise UserError(f"{said}: {error}") from error
        return {"input_size": (height, width)}
    return change


def _told_other(spec: ModelSpec, said: str, height: int, width: int) -> dict[str, Any]:
    """Models of other libraries are run on the images first, and told their size where they refuse them."""
    change: dict[str, Any] = {"input_size": (height, width)}
    try:
        _laid_out(spec.model_copy(update=change))
    except MissingDependency:
        raise
    except UserError as error:
        name = LIBRARIES[spec.library].size_argument(spec)
        if name is None:
            raise UserError(f"{said}: {error}") from error
        change = {**change, "kwargs": {**spec.kwargs, name: plain_size((1, height, width))}}
        try:
            _laid_out(spec.model_copy(update=change))
        except UserError as second:
            raise UserError(f"{said}: {second}") from second
    return change


def _laid_out(spec: ModelSpec) -> nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return build_model(spec)


def _check(model: nn.Module, said: str, height: int, width: int, own: ModelSpec) -> None:
    """Raise `UserError` if the patches do not divide the image, whose edge would be cut off, or the model does not run on it.
    `own`: the model as it is without a size."""
    described: Any = model.pretrained_cfg
    cut = _patches(model)
    seen: list[Tensor] = []
    handle = cut.register_forward_pre_hook(lambda module, args: seen.append(args[0])) if cut is not None else None
    try:
        with torch.no_grad():
            model(torch.empty(1, described["input_size"][0], height, width, device="meta"))
    except Exception as error:  # each model has its own
        reason = reason_of(error)
        _refuse_cut(cut, (height, width), said)
        if VALUES.search(reason):
            why = f"its forward reads values of tensors in Python, which cannot be exported ({reason}); write it with torch alone"
            raise UserError(f"{said} cannot be laid out: {why}") from error
        if OF_SIZE.search(reason) or _runs(own):
            raise UserError(f"{said} cannot take images of {height} x {width} pixels ({reason}); give another size") from error
        raise UserError(f"{said} does not run on one image of {height} x {width} pixels: {reason}") from error
    finally:
        if handle is not None:
            handle.remove()
    if seen:
        _refuse_cut(cut, (int(seen[0].shape[-2]), int(seen[0].shape[-1])), said)


def _runs(spec: ModelSpec) -> bool:
    """Whether the model runs on one image of its own size."""
    try:
        model: Any = _laid_out(spec)
        with torch.no_grad():
            model(torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
    except Exception:  # each model has its own
        return False
    return True


def _refuse_cut(cut: nn.Conv2d | None, sides: tuple[int, int], said: str) -> None:
    if cut is not None and (sides[0] % cut.stride[0] or sides[1] % cut.stride[1]):
        rows, columns = cut.stride
        raise UserError(f"{said} cuts images into patches of {rows} x {columns} pixels; give multiples of them")


def _patches(model: nn.Module) -> nn.Conv2d | None:
    """The convolution that cuts images into patches, if there is one."""
    if isinstance(model, AdaptedModel):
        cut = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    else:
        embed = getattr(model, "patch_embed", None)
        cut = None if getattr(embed, "dynamic_img_pad", False) else getattr(embed, "proj", None)
    return cut if isinstance(cut, nn.Conv2d) and cut.kernel_size == cut.stride else None
