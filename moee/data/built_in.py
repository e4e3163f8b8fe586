"""The built-in image sets out of scikit-learn and scikit-image: digits, an easy domain, and photographs, a hard one, once
without labels and once with the photograph as the class."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

from moee.data.image_set import ImageSet, Source, TensorSet
from moee.data.source import DataSource
from moee.data.transform import Transform, mode_of
from moee.errors import UserError
from moee.progress import Reporter, silent

CALIBRATION_PHOTOS = (
    "astronaut.png", "motorcycle_left.png", "retina.jpg", "hubble_deep_field.jpg", "moon.png", "grass.png", "brick.png",
    "gravel.png", "coins.png", "camera.png", "ihc.png", "color.png", "text.png", "page.png",
)  # fmt: skip
HELD_OUT_PHOTOS = ("coffee.png", "chelsea.png", "rocket.jpg", "horse.png", "china.jpg", "flower.jpg")
CALIBRATION_CROPS, HELD_OUT_CROPS = 22, 16  # a photograph: 308 crops for calibration, 96 held out
DIGITS_HELD_OUT = 0.4
TRAINING_PART = 0.6  # of a photograph's width, from the left
CROPS = {"train": 40, "val": 20}  # a photograph: 800 for training, 400 held out
MOST_CROPS = 1000  # a photograph
SMALLEST_CROP = 0.25  # of the sides of the largest crop that fits


class Digits(DataSource):
    """`digits`."""

    def takes(self, name: str) -> bool:
        return name == "digits"

    def open(self, name: str, transform: Transform, splits: Sequence[str], seed: int, report: Reporter = silent) -> Source:
        return Source({split: digits(transform, split) for split in splits}, notes=_beside(name))


class Photos(DataSource):
    """`photos`, or `photos:N` with N crops a photograph."""

    def takes(self, name: str) -> bool:
        return name.partition(":")[0] == "photos"

    def open(self, name: str, transform: Transform, splits: Sequence[str], seed: int, report: Reporter = silent) -> Source:
        return Source({split: photos(name, transform, split, seed) for split in splits}, notes=_beside(name))


class PhotoCrops(DataSource):
    """`photo-crops`, or `photo-crops:N` with N held-out crops a photograph: more tell accuracies apart more finely."""

    def takes(self, name: str) -> bool:
        return name.partition(":")[0] == "photo-crops"

    def open(self, name: str, transform: Transform, splits: Sequence[str], seed: int, report: Reporter = silent) -> Source:
        held_out = _count(name, "held-out crops", CROPS["val"])
        return Source({split: PhotoCropSet(transform, split, held_out) for split in splits}, notes=_beside(name))


def _count(name: str, what: str, usual: int) -> int:
    """N of `NAME:N`, which is how many of `what` there are a photograph; the usual number without it."""
    kind, colon, text = name.partition(":")
    if not colon:
        return usual
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= MOST_CROPS:
        raise UserError(
            f"data {name!r}: expected {kind}:N with N {what} a photograph, from 1 to {MOST_CROPS}, for example {kind}:64"
        )
    return int(text)


def _beside(name: str) -> list[str]:
    """A sentence if a folder of the user's has the name too."""
    return [f"these are the built-in {name}; give ./{name} for your folder"] if os.path.isdir(name) else []


class PhotoSet(TensorSet):
    """Crops of whole photographs, `photos` by name; crop i is of photograph i // (crops a photograph)."""

    def __init__(self, images: Tensor, photos: Sequence[str]):
        super().__init__("photos", images, [-1] * len(images))
        self.photos = photos

    def picture(self, index: int) -> Image.Image | Tensor:
        return photo(self.photos[index * len(self.photos) // len(self)])


class PhotoCropSet(ImageSet):
    """Crops of random scale and place, `photo-crops` by name; the class of a crop is the photograph that it was cut from.

    Crops for training are cut from the left 60 % of a photograph and held-out crops from the right 40 %, so none shows a pixel
    of the other. They are always the same, and have the shape of the model's images. `held_out`: held-out crops a photograph.
    """

    def __init__(self, transform: Transform, split: str, held_out: int = CROPS["val"]):
        photographs, count = sorted((*CALIBRATION_PHOTOS, *HELD_OUT_PHOTOS)), held_out if split == "val" else CROPS[split]
        labels = [label for label in range(len(photographs)) for _ in range(count)]
        super().__init__("photo-crops", labels, [Path(name).stem for name in photographs])
        self.transform, self.split = transform, split
        self.origins = [photographs[label] for label in labels]
        self.places = torch.rand(len(labels), 3, generator=torch.Generator().manual_seed(list(CROPS).index(split)))

    def picture(self, index: int) -> Image.Image:
        """The training or the held-out part of the whole photograph."""
        whole = photo(self.origins[index])
        border = round(TRAINING_PART * whole.width)
        return whole.crop((0, 0, border, whole.height) if self.split == "train" else (border, 0, whole.width, whole.height))

    def load(self, index: int) -> Tensor:
        part, (_, height, width) = self.picture(index), self.transform.shape
        scale, left, top = self.places[index].tolist()
        share = SMALLEST_CROP ** (1 - scale) * min(part.width / width, part.height / height)
        left, top = left * (part.width - share * width), top * (part.height - share * height)
        box = (left, top, min(part.width, left + share * width), min(part.height, top + share * height))
        crop = part.convert(mode_of(self.transform.shape)).resize((width, height), Image.Resampling.BICUBIC, box=box)
        return self.transform.normalise(to_tensor(crop)[None])[0]


def digits(transform: Transform, split: str) -> ImageSet:
    """scikit-learn's digits, upsampled: 1,078 for training, 719 held out, stratified, always the same split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    loaded = load_digits()
    rows = np.arange(len(loaded.target))
    train, held_out = train_test_split(rows, test_size=DIGITS_HELD_OUT, random_state=0, stratify=loaded.target)
    chosen = train if split == "train" else held_out
    grey = torch.from_numpy(loaded.images[chosen]).float().div_(16.0)[:, None]
    channels, *size = transform.shape
    images = nn.functional.interpolate(grey, size, mode="bicubic", align_corners=False).clamp_(0, 1)
    labels = [int(label) for label in loaded.target[chosen]]
    return TensorSet("digits", transform.normalise(images.expand(-1, channels, -1, -1)), labels, 10)


def photo_path(name: str) -> Path:
    """Where a photograph lies in its package. Raises `UserError` if that is not installed."""
    package, folder = ("sklearn", "datasets/images") if name in ("china.jpg", "flower.jpg") else ("skimage", "data")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the built-in photos need {package}; install it with pip install {package}")
    return Path(spec.origin).parent / folder / name


@lru_cache(len(CALIBRATION_PHOTOS) + len(HELD_OUT_PHOTOS))
def photo(name: str) -> Image.Image:
    """A whole photograph in RGB."""
    return Image.open(photo_path(name)).convert("RGB")


def photos(source: str, transform: Transform, split: str, seed: int) -> ImageSet:
    """Random crops at native resolution (small photographs are enlarged first). Unlabelled."""
    names, count = (CALIBRATION_PHOTOS, CALIBRATION_CROPS) if split == "train" else (HELD_OUT_PHOTOS, HELD_OUT_CROPS)
    wanted = _count(source, "crops", count)
    count = wanted if split == "train" else count
    _, height, width = transform.shape
    crops = []
    for position, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed * 1000 + position + (0 if split == "train" else 500))
        image = photo(name)
        scale = max(width / image.width, height / image.height)
        if scale > 1:
            image = image.resize((math.ceil(image.width * scale), math.ceil(image.height * scale)), Image.Resampling.BICUBIC)
        pixels = to_tensor(image.convert(mode_of(transform.shape)))
        for _ in range(count):
            top = int(torch.randint(pixels.shape[1] - height + 1, (1,), generator=generator))
            left = int(torch.randint(pixels.shape[2] - width + 1, (1,), generator=generator))
            crops.append(pixels[:, top : top + height, left : left + width])
    return PhotoSet(transform.normalise(torch.stack(crops)), names)
