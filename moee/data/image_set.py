"""Image sets: what a model sees of them, reading in batches, and the pictures behind them. `moee.data.sources` opens them by
name.

Every dataset yields `(index, image [C, H, W] float32 or why it cannot be read, label)`; label -1 is no label.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moee.data.class_names import MAX_NAMED, class_name, listed
from moee.errors import UserError
from moee.models.model import Shape
from moee.parallel.group import Group
from moee.parallel.machine import startable_processes
from moee.progress import Reporter, silent, track
from moee.schema import reason_of
from moee.store.file_content import COMPARED, Stored, spread

log = logging.getLogger("moee")

SPLITS = {"train": ("train",), "val": ("validation", "val", "test")}  # what sets of images call them
HELD_OUT = 0.2  # of a source that is not divided
UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what decoders raise
SAMPLED = 256  # images that tell a set from another one: about a second
TASKS = 3  # that reading ahead takes: a process, a thread of its own, and one here
MAX_SKIPPED = 20  # names of unreadable images in a manifest


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
    """Images with a name, a label each and a transform. Subclasses implement `load`.

    Label i means `classes[i]`, -1 no class; `classes` are names, or how many there are where they have none but their numbers.
    `notes`: sentences about what was left out or guessed. `workers`: processes that read and decode ahead; 0 does it in between.
    `division`: what it was divided from, None for a split of its own.
    """

    workers = 0
    notes: tuple[str, ...] = ()
    division: Division | None = None

    def __init__(self, name: str, labels: list[int], classes: Sequence[str] | int = ()):
        self.name, self.labels = name, labels
        self.classes = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
        self.skipped: dict[int, str] = {}
        self.unknown: dict[str, int] = {}  # classes that `renumber` knew no number of, with their images

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def labelled(self) -> bool:
        """Whether any image has one of several classes."""
        return self.num_classes > 1 and any(label >= 0 for label in self.labels)

    def counts(self) -> dict[str, int]:
        """Images of every class that has any."""
        counted = Counter(self.labels)
        return {name: counted[number] for number, name in enumerate(self.classes) if counted[number]}

    def summary(self, split: str) -> str:
        """What was read, as a phrase: "val: 96 images, 3 classes (no 'tulip')"."""
        text, have = f"{split}: {len(self)} {'image' if len(self) == 1 else 'images'}", self.counts()
        if not self.labelled:
            return f"{text}, unlabelled"
        missing = [name for name in self.classes if name not in have]
        if len(missing) <= max(MAX_NAMED, len(have)):
            text += f", {len(have)} class{'es' if len(have) != 1 else ''}" + (f" (no {listed(missing)})" if missing else "")
        else:
            text += f", {len(have)} of {len(self.classes)} classes"
        unlabelled = len(self) - sum(have.values())
        return text + (f", {unlabelled} without a label" if unlabelled else "")

    def facts(self) -> dict[str, Any]:
        """The same for a manifest, with what could not be read; `first_skipped` are some of its names."""
        have, names = self.counts(), [name for _, name in sorted(self.skipped.items())]
        return {
            "images": len(self), "classes": len(have), "unlabelled": len(self) - sum(have.values()),
            "skipped": len(names), "first_skipped": names[:MAX_SKIPPED],
        }  # fmt: skip

    def renumber(self, classes: Sequence[str], number: Callable[[str], int]) -> dict[str, int]:
        """Label the images by other `classes`, in which a name has a `number` or -1; what has none, with its images."""
        before = self.counts()
        table = {old: number(name) for old, name in enumerate(self.classes)}
        self.labels = [table.get(label, -1) for label in self.labels]
        self.classes = tuple(classes)
        self.unknown = {name: count for name, count in before.items() if number(name) < 0}
        return self.unknown

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Tensor:
        raise NotImplementedError

    def picture(self, index: int) -> Image.Image | Tensor:
        """What views are drawn from: the image as it was stored, or a normalised tensor where there is nothing else."""
        return self.load(index)

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def stored(self, index: int) -> Stored | None:
        """Where an image lies; None where it lies in no file."""
        return None

    def content(self, report: Reporter = silent) -> bytes:
        """What tells this data set from another one with the same labels, wherever it lies; a resumed run compares it. Here the
        name and some images as they are loaded, since nobody says where they are from."""
        digest = hashlib.sha256(self.name.encode(errors="surrogateescape"))
        for index in track(spread(range(len(self)), SAMPLED), COMPARED, min(len(self), SAMPLED), report):
            try:
                digest.update(self.load(index).contiguous().numpy().tobytes())
            except UNREADABLE:
                digest.update(b"unreadable")
        return digest.digest()

    def __getitem__(self, index: int) -> tuple[int, Tensor | str, int]:
        try:
            return index, self.load(index), self.labels[index]
        except UserError:  # a `ValueError` that is about all images
            raise
        except UNREADABLE as error:
            return index, reason_of(error), self.labels[index]


class TensorSet(ImageSet):
    """Images that are in memory already: `images` [N, C, H, W] float32, normalised."""

    def __init__(self, name: str, images: Tensor, labels: list[int], classes: Sequence[str] | int = ()):
        super().__init__(name, labels, classes)
        self.images = images

    def load(self, index: int) -> Tensor:
        return self.images[index]

    def content(self, report: Reporter = silent) -> bytes:
        return hashlib.sha256(self.images.contiguous().numpy().data).digest()


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
    """One batch for each list of positions, as `batches`; a list that holds no readable image gives none. Raises
    `UserError` if no image at all can be read."""
    count = _readers(data, workers or data.workers)
    loader = DataLoader(data, batch_sampler=lists, num_workers=count, collate_fn=list)  # type: ignore[arg-type]
    seen = 0
    for items in loader:
        good = [(i, image, label) for i, image, label in items if not isinstance(image, str)]
        for index, image, _ in items:
            if isinstance(image, str) and index not in data.skipped:
                data.skipped[index] = data.describe(index)
                name, reason = class_name(data.skipped[index]), "" if data.skipped[index] in image else f": {image}"
                log.warning("skipped unreadable image %s (%d so far)%s", name, len(data.skipped), reason)
        if good:
            seen += len(good)
            indices, images, labels = zip(*good, strict=True)
            yield Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices))
    if strict and not seen:
        first = next(iter(data.skipped.values()), data.name)
        raise UserError(f"none of the {len(data)} images of {data.name} could be read (first: {first}); check the files")


def _readers(data: ImageSet, count: int) -> int:
    """The `count` of processes that read ahead, or none where they and their threads cannot be started."""
    if not count or startable_processes(TASKS * count) == TASKS * count:
        return count
    log.warning("%d processes that read images ahead cannot be started (ulimit -u): this one reads them", count)
    data.workers = 0  # what is asked for by hand is tried again
    return 0


def say_read(**splits: ImageSet) -> None:
    """Log what was read, and what was left out or guessed."""
    log.info("; ".join(data.summary(split) for split, data in splits.items()))
    for note in dict.fromkeys(note for data in splits.values() for note in data.notes):
        log.warning("%s", class_name(note))


def skipped_line(*splits: dict[str, Any]) -> str:
    """What could not be read of splits with these `facts`, as a sentence; empty if everything could."""
    total = sum(facts["skipped"] for facts in splits)
    names = [name for facts in splits for name in facts["first_skipped"]][:MAX_NAMED]
    more = f" and {total - len(names)} more" if total > len(names) else ""
    return f"skipped {total} unreadable {'image' if total == 1 else 'images'}: {listed(names, False)}{more}" if total else ""


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


@dataclass(frozen=True)
class Division:
    """What a source without splits was divided from: how many `images` (0: it had splits), and a hash of their `names` in order
    ("" in artifacts of before). One image more or less draws another fifth: images that were trained on would be held out.

    A draw by each image's own name would stay when a folder grows, but would give every artifact of before another fifth than the
    one that it was measured on. So the whole is compared, and a folder that changed is refused.
    """

    images: int
    names: str = ""

    @classmethod
    def of(cls, names: Iterable[str]) -> Division:
        """The division of images with these names, which say where below the source each lies."""
        listing, digest = list(names), hashlib.sha256()
        for name in listing:
            digest.update(name.encode(errors="surrogateescape") + b"\0")
        return cls(len(listing), digest.hexdigest()[:16])

    def check(self, data: ImageSet) -> None:
        """Raise `UserError` unless `data` is divided from the same images, or has splits of its own by now."""
        found = data.division
        if found is None or found == self or (not self.names and found.images == self.images):
            return
        was = f"{self.images} images of it" if self.images else "splits of it"
        now = f"{found.images} now" if found.images != self.images else "as many others now"
        raise UserError(
            f"data {data.name!r} has no splits: the artifact was made on {was}, there are {now}, so images that were trained on "
            "would be held out; give held-out images in a folder val beside train, or extract again"
        )


def divide(total: int, seed: int) -> dict[str, list[int]]:
    """Positions of the training and the held-out part of a source without splits: a fifth, drawn with `seed`, is held out.
    A single image is both."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = max(1, round(total * HELD_OUT)) if total > 1 else 0
    return {"train": sorted(order[held_out:]), "val": sorted(order[:held_out] or order)}


@dataclass(frozen=True)
class Source:
    """What a source of images holds, before its classes are numbered: image sets that number their own names.

    `divided`: it has splits of its own. `empty`: names of classes without images. `indices`: its names are class numbers.
    `order`: all names as the source numbers them.
    """

    splits: dict[str, ImageSet]
    divided: bool = True
    empty: Sequence[str] = ()
    indices: bool = False
    order: Sequence[str] = ()
    notes: Sequence[str] = ()
