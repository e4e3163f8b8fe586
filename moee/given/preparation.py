"""How the images of a Python dataset were prepared, as far as its transform says it.

A bundle's runner prepares images on a device by the model's description. Images that Python hands over were prepared by their
loader, so the two can differ. torchvision's transforms are read; what they say is recorded, or held against the description.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from moee.data.transform import Transform
from moee.errors import UserError
from moee.given.datasets import gives_items
from moee.interface.spec import InputConfig
from moee.libraries.from_torchvision import crop_share

WHOLE = {"Compose", "Sequential"}
HARMLESS = {"RGB", "Identity", "ToTensor", "PILToTensor", "ToImage"}
ORDERS = (["Resize", "Normalize"], ["Resize", "CenterCrop", "Normalize"])  # the only ones that timm's transform can repeat
PARTS = ("mean", "std", "crop_pct", "crop_mode", "interpolation")


def read_preparation(given: Any) -> InputConfig | None:
    """What the transform of a loader or dataset says: a resize, a crop in its middle, mean and deviation of pixels in 0..1. None
    where there is none, where it holds anything else or in another order, and where the loader collates or iterates in a way of
    its own."""
    if isinstance(given, DataLoader) and not gives_items(given):
        return None
    dataset = given.dataset if isinstance(given, DataLoader) else given
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    transform = getattr(dataset, "transform", None)
    steps = _scaled(_flat(transform)) if transform is not None else None
    if steps is None or [type(step).__name__ for step in steps] not in ORDERS:
        return None
    resize, normalize = steps[0], steps[-1]
    before, after = _sides(resize.size), _sides(steps[1].size if len(steps) == 3 else resize.size)
    if before is None or after is None or getattr(resize, "max_size", None) is not None or resize.antialias is False:
        return None
    shape = _crop(before, after)
    if shape is None:
        return None
    share, mode = shape
    kind = getattr(resize.interpolation, "value", resize.interpolation)  # an enumeration, or its value
    try:
        return InputConfig(
            mean=tuple(normalize.mean), std=tuple(normalize.std), crop_pct=share, crop_mode=mode, interpolation=kind
        )
    except ValueError:  # of values that no description holds, such as an interpolation by its number
        return None


def _scaled(steps: list[Any]) -> list[Any] | None:
    """The steps without those that turn a picture into numbers in 0..1; None where that is not what they do."""
    left, scaled = [], False
    for step in steps:
        name = type(step).__name__
        if name in ("ToDtype", "ConvertImageDtype"):
            if step.dtype is not torch.float32 or not getattr(step, "scale", True):
                return None
            scaled = True
        elif name in HARMLESS:
            scaled = scaled or name == "ToTensor"
        else:
            if name == "Normalize" and not scaled:
                return None
            left.append(step)
    return left


def differences(given: InputConfig, transform: Transform) -> list[str]:
    """What a loader's preparation and the model's description say differently, each as `mean 0.5 0.5 0.5, not 0.4 0.4 0.4`."""
    wanted: Mapping[str, Any] = {**transform.config, "mean": transform.mean, "std": transform.std}
    told = []
    for name in PARTS:
        ours, theirs = getattr(given, name), wanted.get(name)
        if name == "crop_mode" and float(wanted.get("crop_pct") or 0) == 1 == given.crop_pct and _square(transform):
            continue  # with nothing cut off a square, the ways to crop differ in pictures that are not square alone
        if ours is not None and not _equal(ours, theirs):
            told.append(f"{name} {_text(ours)}, not {_text(theirs)}")
    return told


def refuse_unfit(given: InputConfig, transform: Transform) -> None:
    """Raise `UserError` where what was said of the images is not of those that the model takes."""
    if given.input_size is not None and given.input_size != transform.shape:
        came, takes = (" x ".join(map(str, sizes)) for sizes in (given.input_size, transform.shape))
        raise UserError(f"input_size of input= is {came}, and the model takes images of {takes}; leave it out")
    channels = transform.shape[0]
    for name, values in (("mean", given.mean), ("std", given.std)):
        if values is not None and len(values) not in (1, channels):
            raise UserError(f"{name} of input= has {len(values)} numbers, and the images {channels} channels; give one for each")


def _square(transform: Transform) -> bool:
    return transform.shape[1] == transform.shape[2]


def _flat(transform: Any) -> list[Any]:
    """The steps of a transform, those of compositions in their place."""
    if type(transform).__name__ in WHOLE:
        steps = getattr(transform, "transforms", None)
        return [step for part in (transform if steps is None else steps) for step in _flat(part)]
    return [transform]


def _sides(size: Any) -> tuple[int, ...] | None:
    """One side, the shorter one's, or height and width."""
    sides = (size,) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    return sides if len(sides) in (1, 2) and all(isinstance(side, int) and side > 0 for side in sides) else None


def _crop(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[float, str] | None:
    """Share and mode of the crop, for sides that a resize gives and those that stay."""
    height, width = after * 2 if len(after) == 1 else after
    if len(before) == 2:  # both sides are made to fit, and nothing may be cut off then
        return (1.0, "squash") if (height, width) == before else None
    if height != width or height > before[0]:
        return None
    return crop_share(height, before[0]), "center"


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, tuple):
        return len(ours) == len(theirs or ()) and all(abs(a - b) < 1e-4 for a, b in zip(ours, theirs, strict=True))
    return abs(ours - theirs) < 5e-3 if isinstance(ours, float) and isinstance(theirs, float) else ours == theirs


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(f"{number:.4g}" for number in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
