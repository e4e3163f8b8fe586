"""Collages of training images: what calibration, refit and distillation see where the images at hand are few.

Shapes of random size and outline lie over one another, as in the dead-leaves model of natural images (Lee, Mumford and Huang,
"Occlusion models for natural images", IJCV 41, 2001). Each shows a cut-out of a training image, often in other colours, a
gradient, or noise with the falling spectrum of natural images. The dense model says what their outputs should be, so they need no
label.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from moee.data.image_set import UNREADABLE, ImageSet
from moee.data.transform import Transform, mode_of

SHAPES = (1, 2, 3, 5, 8, 15, 30)  # as many of them in one collage
CUT_OUTS, GRADIENTS = 0.6, 0.25  # what shapes show; the others show noise
LEAST = 24  # pixels along the side of the smallest cut-out
ATTEMPTS = 20  # images that are tried for one cut-out before the collage counts as unreadable


class Collages(ImageSet):
    """`count` collages for every image of `data`, cut from the images at the positions `among` (default: from all).

    Collage i depends on these, `seed` and i alone; none has a label.
    """

    def __init__(self, data: ImageSet, transform: Transform, count: int, seed: int, among: Sequence[int] | None = None):
        super().__init__(f"collages of {data.name}", [-1] * (len(data) * count), data.classes)
        self.data, self.transform, self.seed, self.workers = data, transform, seed, data.workers
        self.among = range(len(data)) if among is None else among

    def load(self, index: int) -> Tensor:
        draw = random.Random(f"{self.seed} {index}")
        _, height, width = self.transform.shape
        side = math.sqrt(height * width)
        canvas = self._texture(draw, max(height, width)).crop((0, 0, width, height))
        for _ in range(draw.choice(SHAPES)):
            # few large shapes and many small ones: radii from 3 % of the side, with the heavy tail of objects in photographs
            radius = side * min(0.54, 0.03 * draw.paretovariate(0.9))
            outline = _outline(draw, radius)
            corner = [round(draw.uniform(-0.06, 1.06) * whole - outline.width / 2) for whole in (width, height)]
            canvas.paste(self._texture(draw, outline.width), (corner[0], corner[1]), outline)
        if draw.random() < 0.3:
            canvas = canvas.filter(ImageFilter.GaussianBlur(draw.uniform(0.3, 2)))
        canvas = ImageEnhance.Brightness(canvas).enhance(draw.uniform(0.6, 1.3))
        canvas = ImageEnhance.Contrast(canvas).enhance(draw.uniform(0.6, 1.4))
        return self.transform.normalise(to_tensor(canvas.convert(mode_of(self.transform.shape))))

    def describe(self, index: int) -> str:
        return f"collage {index} of {self.data.name}"

    def _texture(self, draw: random.Random, side: int) -> Image.Image:
        """A square of `side` pixels."""
        kind = draw.random()
        if kind < CUT_OUTS:
            return self._cut_out(draw, side)
        ends = np.array([[draw.uniform(0, 255) for _ in range(3)] for _ in range(2)])
        if kind < CUT_OUTS + GRADIENTS:
            if draw.random() < 0.3:
                ends[1] = ends[0]  # one colour
            angle = draw.uniform(0, 2 * math.pi)
            down, across = np.mgrid[:side, :side]
            return _coloured(across * math.cos(angle) + down * math.sin(angle), ends)
        return _coloured(_noise(side, draw.uniform(0.5, 2.2), draw.getrandbits(32)), ends)

    def _cut_out(self, draw: random.Random, side: int) -> Image.Image:
        """A part of a training image, turned by quarters, in most cases in other colours."""
        picture = self._picture(draw)
        whole = min(picture.size)
        # a shape shows as much of the image as it covers of the collage, times a zoom
        cut = min(whole, max(LEAST, round(whole * draw.uniform(0.1, 1) * side / max(self.transform.shape[1:]))))
        left, top = draw.randrange(picture.width - cut + 1), draw.randrange(picture.height - cut + 1)
        part = picture.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + cut, top + cut))
        part = part.rotate(draw.choice((0, 90, 180, 270)))
        if draw.random() < 0.5:
            part = ImageOps.mirror(part)
        if draw.random() < 0.6:
            hue, saturation, value = part.convert("HSV").split()
            shift, factor, more = draw.randrange(256), draw.uniform(0.2, 2), draw.uniform(0, 60)
            hue = hue.point([(level + shift) % 256 for level in range(256)])
            saturation = saturation.point([min(255, round(level * factor + more)) for level in range(256)])
            part = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        return ImageOps.invert(part) if draw.random() < 0.1 else part

    def _picture(self, draw: random.Random) -> Image.Image:
        """A training image that can be read."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self.transform.picture(self.data.picture(draw.choice(self.among))).convert("RGB")
            except UNREADABLE:
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")


def _coloured(levels: np.ndarray, ends: np.ndarray) -> Image.Image:
    """Levels [S, S] of any range as the colours between ends[0] (the lowest) and ends[1]."""
    share = (levels - levels.min()) / max(float(np.ptp(levels)), 1e-6)
    return Image.fromarray((ends[0] + (ends[1] - ends[0]) * share[..., None]).astype(np.uint8))


def _noise(side: int, slope: float, seed: int) -> np.ndarray:
    """Noise [S, S] whose amplitude falls with frequency to the power `slope`; natural images have about 1."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1
    white = np.random.default_rng(seed).standard_normal((side, side))
    return np.fft.ifft2(np.fft.fft2(white) / frequency**slope).real


def _outline(draw: random.Random, radius: float) -> Image.Image:
    """A mask: an ellipse, a rectangle or a star-shaped polygon, turned, its edge soft at times."""
    centre = math.ceil(1.6 * radius) + 4
    mask = Image.new("L", (2 * centre, 2 * centre))
    pen, kind = ImageDraw.Draw(mask), draw.random()
    if kind < 0.4:
        height = radius * draw.uniform(0.5, 1.5)
        pen.ellipse((centre - radius, centre - height, centre + radius, centre + height), fill=255)
    elif kind < 0.55:
        pen.rectangle((centre - radius, centre - radius * draw.uniform(0.3, 1.5), centre + radius, centre + radius), fill=255)
    else:
        corners = sorted(draw.uniform(0, 2 * math.pi) for _ in range(draw.randrange(3, 9)))
        reach = [radius * draw.uniform(0.5, 1.3) for _ in corners]
        pen.polygon(
            [(centre + r * math.cos(a), centre + r * math.sin(a)) for r, a in zip(reach, corners, strict=True)], fill=255
        )
    if draw.random() < 0.5:
        mask = mask.rotate(draw.uniform(0, 180))
    return mask.filter(ImageFilter.GaussianBlur(draw.uniform(0.5, 3))) if draw.random() < 0.3 else mask
