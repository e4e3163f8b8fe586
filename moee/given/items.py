"""One item that Python hands over: an image with its label, checked."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moee.errors import UserError
from moee.models.model import Shape
from moee.schema import shown

IMAGE_KEYS = ("pixel_values", "image", "images")  # of items that are dictionaries
LABEL_KEYS = ("labels", "label", "targets", "target")
EXPECTED = "expected pairs of an image and a label, images alone, or dictionaries with 'pixel_values' and 'labels'"


def item_of(item: Any, name: str) -> tuple[Tensor, int]:
    """Image [C, H, W] and label (-1: none) of one item of a dataset. Raises `UserError` that says what came."""
    image, label = pair_of(item, name)
    return image.detach().float(), -1 if label is None else label_of(label, name)


def pair_of(item: Any, name: str) -> tuple[Tensor, Any]:
    """Image and label (None without one) of what a dataset gives. Raises `UserError` for anything else."""
    if isinstance(item, Mapping):
        image = next((item[key] for key in IMAGE_KEYS if key in item), None)
        label = next((item[key] for key in LABEL_KEYS if key in item), None)
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        image, label = item
    elif isinstance(item, Tensor):
        image, label = item, None
    else:
        many = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise UserError(f"{name} yields {type(item).__name__}{many}; {EXPECTED}")
    if not isinstance(image, Tensor) or not image.is_floating_point():
        came = f"{image.dtype} tensors" if isinstance(image, Tensor) else type(image).__name__
        raise UserError(f"{name} yields images as {came}; expected float tensors, normalised as the model takes them")
    return image, label


def label_of(label: Any, name: str) -> int:
    """A label as a whole number from 0, or -1. Raises `UserError` for anything else."""
    if isinstance(label, Tensor) and label.ndim == 0 and not label.is_floating_point():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, numbers.Integral) or not -1 <= int(label) < 1 << 31:
        raise UserError(f"{name} yields the label {shown(label)}; expected whole numbers from 0, or -1 for none")
    return int(label)


def check_shape(image: Tensor, shape: Shape, name: str) -> None:
    """Raise `UserError` unless `image` has this shape (C, H, W)."""
    if tuple(image.shape) != tuple(shape):
        came, wanted = (" x ".join(map(str, sizes)) for sizes in (image.shape, shape))
        raise UserError(f"{name} yields images of {came}, the model takes {wanted}; change the transform, or the model's size")
