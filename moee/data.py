"""Images for calibration, fine-tuning and accuracy: two built-in sets, image folders, any `timm.data` dataset.

Every dataset yields `(index, image [C, H, W] float32 or None, label)`: None marks an unreadable file, label -1 no label.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from moee.distributed import Group
from moee.errors import UserError
from moee.models import Shape
from moee.schema import shown

log = logging.getLogger("moee")

FOLDER_HELD_OUT = 0.2
VALIDATION_FOLDERS = ("val", "validation", "test")
UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what decoders raise


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

    def picture(self, image: Image.Image | Tensor) -> Image.Image:
        """What `ImageSet.picture` gives, as an RGB picture."""
        return (to_pil_image(self.pixels(image).clamp(0, 1)) if isinstance(image, Tensor) else image).convert("RGB")


def model_transform(model: nn.Module) -> Transform:
    """The transform that travels with a timm model; the size is the one that the model was built for."""
    config = timm.data.resolve_model_data_config(model)
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built is not None:
        config["input_size"] = (config["input_size"][0], *built)
    channels, height, width = config["input_size"]
    return Transform((int(channels), int(height), int(width)), tuple(config["mean"]), tuple(config["std"]), config)


def image_shape(images: Tensor) -> Shape:
    """The shape of each image of a batch [N, C, H, W]."""
    _, channels, height, width = images.shape
    return channels, height, width


@dataclass(frozen=True)
class Batch:
    """`images` [B, C, H, W] float32, `labels` [B] int64 (-1: none), `indices` [B] int64 positions in the dataset."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class ImageSet(Dataset):
    """Images with a name, an optional label each and a transform. Subclasses implement `load`.

    `workers`: processes that read and decode ahead; 0 does it in between.
    """

    workers = 0

    def __init__(self, name: str, labels: list[int], num_classes: int):
        self.name, self.labels, self.num_classes = name, labels, num_classes
        self.skipped: dict[int, str] = {}

    @property
    def labelled(self) -> bool:
        return self.num_classes > 1

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Tensor:
        raise NotImplementedError

    def picture(self, index: int) -> Image.Image | Tensor:
        """What views are drawn from: the image as it was stored, or a normalised tensor where there is nothing else."""
        return self.load(index)

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def content(self) -> bytes:
        """What tells this data set from another one of the same name and labels; a resumed run compares it."""
        return b""

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, int]:
        try:
            return index, self.load(index), self.labels[index]
        except UNREADABLE:
            return index, None, self.labels[index]


class TensorSet(ImageSet):
    """Images that are in memory already: `images` [N, C, H, W] float32, normalised."""

    def __init__(self, name: str, images: Tensor, labels: list[int], num_classes: int):
        super().__init__(name, labels, num_classes)
        self.images = images

    def load(self, index: int) -> Tensor:
        return self.images[index]

    def content(self) -> bytes:
        return hashlib.sha256(self.images.contiguous().numpy().data).digest()


class TimmSet(ImageSet):
    """A `timm.data` map-style dataset, transformed as the model asks; `positions` selects images from it."""

    def __init__(self, name: str, dataset: Any, positions: list[int], labels: list[int], num_classes: int):
        super().__init__(name, labels, num_classes)
        self.dataset, self.positions = dataset, positions

    def load(self, index: int) -> Tensor:
        position = self.positions[index]
        if not hasattr(self.dataset, "reader"):
            return self.dataset[position][0]
        return self.dataset.transform(self._open(position))

    def picture(self, index: int) -> Image.Image | Tensor:
        position = self.positions[index]
        return self._open(position) if hasattr(self.dataset, "reader") else self.load(index)

    def _open(self, position: int) -> Image.Image:
        # not dataset[position]: timm quietly returns the next image in the place of an unreadable one
        handle, _ = self.dataset.reader[position]
        return Image.open(handle).convert("RGB")

    def content(self) -> bytes:
        """Names and sizes of the files, where the reader lists them."""
        samples = getattr(getattr(self.dataset, "reader", None), "samples", None)
        paths = [str(samples[p][0]) for p in self.positions] if samples else []
        facts = [f"{Path(path).name} {os.stat(path).st_size if os.path.isfile(path) else -1}" for path in paths]
        return "\n".join(facts).encode()

    def describe(self, index: int) -> str:
        filename = getattr(self.dataset, "filename", None)
        return str(filename(self.positions[index], absolute=True)) if filename else super().describe(index)


def batches(
    data: ImageSet, batch_size: int, workers: int = 0, order: Tensor | None = None, strict: bool = True
) -> Iterator[Batch]:
    """Batches in `order` (default: as stored). Unreadable images are skipped and kept in `data.skipped`.

    Raises `UserError` when no image could be read; `strict` off is for one rank's part, which may have none.
    """
    positions = order if order is not None else torch.arange(len(data))
    return listed_batches(data, [part.tolist() for part in positions.split(batch_size)], workers, strict)


def listed_batches(
    data: ImageSet, lists: Sequence[list[int]], workers: int = 0, strict: bool = True
) -> Iterator[Batch]:
    """One batch for each list of positions, as `batches`; a list that holds no readable image gives none."""
    count = workers or data.workers
    loader = DataLoader(data, batch_sampler=lists, num_workers=count, collate_fn=list)  # type: ignore[arg-type]
    seen = 0
    for items in loader:
        good = [(i, image, label) for i, image, label in items if image is not None]
        for index, image, _ in items:
            if image is None and index not in data.skipped:
                data.skipped[index] = data.describe(index)
                log.warning("skipped unreadable image %s (%d so far)", data.skipped[index], len(data.skipped))
        if good:
            seen += len(good)
            indices, images, labels = zip(*good, strict=True)
            yield Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices))
    if strict and not seen:
        first = next(iter(data.skipped.values()), data.name)
        raise UserError(f"none of the {len(data)} images of {data.name} could be read (first: {first}); check the files")


def merge_skipped(data: ImageSet, group: Group) -> None:
    """Make every rank know what any rank could not read. Raises `UserError` on all when no image could be read."""
    for found in group.all_json(sorted(data.skipped.items())):
        data.skipped.update({int(index): what for index, what in found})
    with group.agreed():
        refuse_all_skipped(data)


def refuse_all_skipped(data: ImageSet) -> None:
    """Raise `UserError` when no image could be read."""
    if len(data.skipped) == len(data):
        first = data.skipped[min(data.skipped)] if data.skipped else data.name
        raise UserError(f"none of the {len(data)} images of {data.name} could be read (first: {first}); check the files")


def load_data(source: str, transform: Transform, split: str = "train", seed: int = 0) -> ImageSet:
    """Open `digits`, `photos` (or `photos:N`, N crops a photograph), an image folder, or a `timm.data` dataset string;
    `wds/FOLDER` is a folder of tar shards.

    `split` is `train` (calibration, fine-tuning) or `val` (held out). A folder is read as `train/` and `val/` below it
    where they exist; otherwise a fifth of it, drawn with `seed`, is held out. Raises `UserError` for a source that is none
    of these, an empty folder, or one whose images cannot be listed.
    """
    if split not in ("train", "val"):
        raise UserError(f"unknown split {split!r}; expected train or val")
    if source == "digits" or source.partition(":")[0] == "photos":
        from moee import built_in

        return built_in.digits(transform, split) if source == "digits" else built_in.photos(source, transform, split, seed)
    if source.startswith("wds/"):
        from moee.shards import open_shards

        return open_shards(source, transform, split, seed)
    return _folder(source, transform, split, seed)


def _folder(source: str, transform: Transform, split: str, seed: int) -> ImageSet:
    root, name, part = Path(source), "", None
    if "/" in source and not root.exists() and source.split("/")[0] in ("torch", "tfds", "hfds", "hfids"):
        name, root, part = source, Path("."), "train" if split == "train" else "validation"
    elif not root.is_dir():
        raise UserError(f"data {source!r}: expected digits, photos, an image folder or a timm.data dataset string")
    divided = not name and (root / "train").is_dir() and any((root / v).is_dir() for v in VALIDATION_FOLDERS)
    if divided:
        root /= "train" if split == "train" else next(v for v in VALIDATION_FOLDERS if (root / v).is_dir())
    try:
        kwargs: dict[str, Any] = {"split": part} if part else {}
        dataset: Any = timm.data.create_dataset(name, root=str(root), **kwargs)
        total = len(dataset)
    except Exception as error:  # readers of many libraries, each with errors of its own
        reason = shown(" ".join(str(error).split()) or type(error).__name__, quoted=False)
        raise UserError(f"data {source!r}: no images found ({reason}); expected image files below it") from error
    dataset.transform = timm.data.create_transform(
        **{**transform.config, "input_size": transform.shape}, is_training=False
    )
    reader: Any = getattr(dataset, "reader", None)
    targets = [int(t) for _, t in reader.samples] if hasattr(reader, "samples") else [-1] * total
    classes = len(set(targets))
    positions = list(range(total))
    if not divided and not part:
        shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = max(1, round(total * FOLDER_HELD_OUT)) if total > 1 else 0
        positions = sorted(shuffled[held_out:] if split == "train" else shuffled[:held_out] or shuffled)
    labels = [targets[p] if classes > 1 else -1 for p in positions]
    return TimmSet(source, dataset, positions, labels, classes if classes > 1 else 0)
