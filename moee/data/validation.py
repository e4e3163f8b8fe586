"""Which training images choose the epoch of a tuning: a tenth, always the same, which the fits of an extraction do not see.

A fit in closed form is best on its own images. If it had seen those that judge the epochs, none would beat the start.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from moee.data.image_set import ImageSet
from moee.progress import Reporter, silent

SHARE = 0.1
SEED = 20_231  # of their order, whatever a run's own seed


def validation_images(count: int, share: float = SHARE) -> Tensor:
    """Ascending positions of the share of `count` images that judge the epochs, at least one. Those of a smaller share are among
    those of a larger one."""
    return _order(count)[: max(1, round(count * share))].sort().values


def other_images(count: int, share: float = SHARE) -> Tensor:
    """Ascending positions of the rest, which is trained on."""
    return _order(count)[max(1, round(count * share)) :].sort().values


def _order(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(SEED))


def fitted_part(data: ImageSet) -> ImageSet:
    """`data` without the images that judge the epochs; all of it where a tenth is less than half an image."""
    return Part(data, other_images(len(data)).tolist()) if round(len(data) * SHARE) else data


class _Skipped(dict[int, str]):
    """What could not be read of a part, by its position there; the whole is told."""

    def __init__(self, whole: dict[int, str], positions: Sequence[int]):
        super().__init__({index: whole[at] for index, at in enumerate(positions) if at in whole})
        self.whole, self.positions = whole, positions

    def __setitem__(self, index: int, what: str) -> None:
        super().__setitem__(index, what)
        self.whole[self.positions[index]] = what


class Part(ImageSet):
    """The images of `data` at `positions`; what could not be read there is known here, and the other way round."""

    def __init__(self, data: ImageSet, positions: Sequence[int]):
        super().__init__(data.name, [data.labels[at] for at in positions], data.classes)
        self.data, self.positions, self.workers = data, positions, data.workers
        self.skipped, self.unknown = _Skipped(data.skipped, positions), data.unknown

    def load(self, index: int) -> Tensor:
        return self.data.load(self.positions[index])

    def picture(self, index: int) -> Image.Image | Tensor:
        return self.data.picture(self.positions[index])

    def describe(self, index: int) -> str:
        return self.data.describe(self.positions[index])

    def content(self, report: Reporter = silent) -> bytes:
        return self.data.content(report)
