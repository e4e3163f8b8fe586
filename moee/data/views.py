"""Random views of training images: what the refit and the distillation see beside the images themselves.

A few calibration images show few textures and scales. Views by timm's training transform (random crop and scale, flip, colour)
cost no new image; the dense model says what their outputs should be, so they need no label.
"""

from __future__ import annotations

import random

import timm.data
import torch
from PIL import Image
from torch import Tensor

from moee.data.collage import Collages
from moee.data.image_set import ImageSet
from moee.data.transform import Transform
from moee.progress import Reporter, silent


class Views(ImageSet):
    """`count` random views of every image of `data`. View i shows image i modulo len(data); it depends on `seed` and i alone."""

    def __init__(self, data: ImageSet, transform: Transform, count: int, seed: int):
        super().__init__(f"views of {data.name}", data.labels * count, data.classes)
        self.data, self.transform, self.seed, self.workers = data, transform, seed, data.workers
        config = {**transform.config, "input_size": transform.shape}
        names = ("input_size", "interpolation", "mean", "std")  # the centre crop is no part of a random one
        self.draw = timm.data.create_transform(**{n: config[n] for n in names if n in config}, is_training=True)

    def load(self, index: int) -> Tensor:
        picture = self.transform.picture(self.data.picture(index % len(self.data)))
        before = random.getstate()  # timm draws from both generators
        with torch.random.fork_rng(devices=[]):
            try:
                random.seed(self.seed * 1_000_003 + index)
                torch.manual_seed(self.seed * 1_000_003 + index)
                return self.draw(picture)
            finally:
                random.setstate(before)

    def describe(self, index: int) -> str:
        return f"a view of {self.data.describe(index % len(self.data))}"


class Joined(ImageSet):
    """The images of `data`, then those of each of `more`, which were made from it."""

    def __init__(self, data: ImageSet, *more: ImageSet):
        super().__init__(data.name, [label for part in (data, *more) for label in part.labels], data.classes)
        self.parts, self.workers = (data, *more), data.workers

    def _at(self, index: int) -> tuple[ImageSet, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(f"{self.name} has {len(self)} images, asked for one {index} behind the last")

    def load(self, index: int) -> Tensor:
        part, position = self._at(index)
        return part.load(position)

    def describe(self, index: int) -> str:
        part, position = self._at(index)
        return part.describe(position)

    def content(self, report: Reporter = silent) -> bytes:
        return self.parts[0].content(report)

    def picture(self, index: int) -> Image.Image | Tensor:
        part, position = self._at(index)
        return part.picture(position)


def widened(data: ImageSet, transform: Transform, views: int, collages: int, seed: int) -> ImageSet:
    """`data`, then `views` views and `collages` collages for each of its images; `data` itself where both are 0."""
    more: list[ImageSet] = [Views(data, transform, views, seed)] if views else []
    more += [Collages(data, transform, collages, seed)] if collages else []
    return Joined(data, *more) if more else data
