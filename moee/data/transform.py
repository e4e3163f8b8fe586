"""What a model expects of an image, and pictures made ready for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from moee.data.image_set import UNREADABLE
from moee.errors import UserError
from moee.models.model import Shape
from moee.schema import reason_of

DEEPEST = (1 << 16) - 1  # level of a 16-bit image
MODES = {1: "L", 3: "RGB"}  # of pictures, by the channels that a model takes
MAX_RESIZED_PIXELS, MAX_RATIO = 1 << 26, 16  # of one picture after its resize: 200 MB; or so many times longer than wide


@dataclass(frozen=True)
class Transform:
    """What a model expects of its input: its shape, mean and deviation a channel, and timm's full description."""

    shape: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    config: dict[str, Any] = field(compare=False)

    def normalise(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in 0..1 to the model's scale."""
        mean, std = self._scale()
        return (images - mean) / std

    def pixels(self, image: Tensor) -> Tensor:
        """A normalised image [C, H, W] back to 0..1."""
        mean, std = self._scale()
        return image * std + mean

    def _scale(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)

    def refuse_oblong(self, width: int, height: int) -> None:
        """Raise `ValueError` for a picture so long and narrow that its shorter side's resize would fill the memory."""
        if self.config.get("crop_mode") == "squash":
            return
        share = self.config.get("crop_pct") or timm.data.DEFAULT_CROP_PCT
        rows, columns = (side / share for side in self.shape[1:])
        resized = width * height * max(rows / height, columns / width) ** 2
        if resized > max(MAX_RESIZED_PIXELS, MAX_RATIO * rows * columns):
            raise ValueError(f"its {width} x {height} pixels would be resized to {resized / 1e6:.0f} million")

    def picture(self, image: Image.Image | Tensor) -> Image.Image:
        """What `ImageSet.picture` gives, as the model takes it: grey or RGB."""
        return (to_pil_image(self.pixels(image).clamp(0, 1)) if isinstance(image, Tensor) else image).convert(mode_of(self.shape))


def mode_of(shape: Shape) -> str:
    """Pillow's mode of pictures of a shape. Raises `UserError` where no picture has so many channels."""
    channels, *_ = shape
    if channels not in MODES:
        raise UserError(
            f"the model takes images of {channels} channels, and files are read as grey (1) or RGB (3); give such images as "
            "tensors in Python (moee.data.image_set.TensorSet)"
        )
    return MODES[channels]


def model_transform(model: nn.Module) -> Transform:
    """The transform that travels with a timm model; the shape is the one that the model was built for.

    Where that has other channels than mean and deviation, grey images get their average and further channels repeat them, as
    timm does with pretrained weights.
    """
    config = timm.data.resolve_model_data_config(model)
    channels, *size = config["input_size"]
    channels = getattr(model, "in_chans", channels)
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    config["input_size"] = (int(channels), int(height), int(width))
    for name in ("mean", "std"):
        config[name] = _per_channel(config[name], channels)
    return Transform(config["input_size"], config["mean"], config["std"], config)


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[channel % len(values)] for channel in range(channels))


def decoded(file: str | BinaryIO, transform: Transform) -> Image.Image:
    """The picture in an image file, `converted`. Raises one of `UNREADABLE`, before it takes memory where the header tells."""
    try:
        with Image.open(file) as picture:
            return converted(picture, transform)
    except (*UNREADABLE, MemoryError):
        raise
    except Exception as error:  # damaged TIFF files raise TypeError, OverflowError and more
        raise ValueError(reason_of(error)) from error


def converted(picture: Image.Image, transform: Transform) -> Image.Image:
    """A picture as the model takes it: grey or RGB. 16-bit grey levels are scaled to 8 bits, which Pillow itself would clip.

    Raises `ValueError` for one that would fill the memory, and for levels of another range: nobody says which is white.
    """
    transform.refuse_oblong(*picture.size)
    if picture.mode[0] in "IF":
        levels = np.asarray(picture)
        if picture.mode == "F" or levels.min() < 0 or levels.max() > DEEPEST:
            raise ValueError(f"levels from {levels.min():g} to {levels.max():g}; expected 8 or 16 bits a channel")
        picture = Image.fromarray((levels / (DEEPEST / 255)).round().astype(np.uint8))
    return picture.convert(mode_of(transform.shape))


def evaluation(transform: Transform) -> Callable[[Image.Image], Tensor]:
    """What makes a model's input of a picture: timm's evaluation transform."""
    return timm.data.create_transform(**{**transform.config, "input_size": transform.shape}, is_training=False)
