"""Datasets and loaders of torch: which images they give, with which labels and class names."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    default_collate,
)

from moee.data.class_names import listed
from moee.data.image_set import UNREADABLE, ImageSet
from moee.data.leaks import digest
from moee.errors import UserError
from moee.given.items import check_shape, item_of, label_of
from moee.models.model import Shape
from moee.progress import Reporter
from moee.schema import reason_of

PREFIX = "python:"  # of the name under which an artifact records such images: it cannot open them again


ANOTHER = "is another image at each read"
COMPARED = "two models would be compared on different images: give held-out images without random transforms"
MOST_DRAWS = 100  # of a sampler, for each image of its dataset
READ_TWICE = 16  # images of a dataset, to see that they stay as they are


class DatasetSet(ImageSet):
    """The `positions` of a dataset that can be indexed. `labels` were read before; an item with another one is an error. What a
    transform draws at random is drawn the same at every read: an image has one view. `held_out`: an image that is another one
    than before is an error."""

    held_out = False
    shape: Shape | None = None  # of every image, where it was looked at

    def __init__(self, name: str, dataset: Any, positions: Sequence[int], labels: Sequence[int], classes: Sequence[str] | int):
        super().__init__(name, list(labels), classes)
        self.dataset, self.positions, self.first = dataset, list(positions), list(labels)
        self.digests: list[bytes] = []  # of the images, if they were read for their labels
        self._read: dict[int, bytes] = {}  # those of held-out images

    def load(self, index: int) -> Tensor:
        image, label = item_of(_item(self.dataset, self.positions[index]), self.name)
        if label != self.first[index]:
            raise UserError(
                f"{self.describe(index)} has the label {label}, and had {self.first[index]} before: a dataset must give an image "
                "the same label each time"
            )
        if self.shape is not None:
            check_shape(image, self.shape, self.describe(index))
        if self.held_out:
            found = digest(image)
            if found != self._read.setdefault(index, self.digests[index] if self.digests else found):
                raise UserError(f"{self.describe(index)} {ANOTHER}; {COMPARED}")
        return image

    def changes(self) -> str:
        """What is another image at a second read, of some that are looked at; empty if nothing is."""
        for index in range(0, len(self), -(-len(self) // READ_TWICE)):
            try:
                first, again = digest(self.load(index)), digest(self.load(index))
            except UserError:  # a `ValueError` that is about all images
                raise
            except UNREADABLE:  # it is named when the set is read
                continue
            if first != again:
                return f"{self.describe(index)} {ANOTHER}"
        return ""


def _item(dataset: Any, position: int) -> Any:
    """An item of a dataset, made with the random numbers that belong to its position. What decoders raise comes as it is,
    anything else as a `UserError`."""
    try:
        with _drawing(position):
            return dataset[position]
    except (*UNREADABLE, MemoryError):  # a `UserError` too
        raise
    except Exception as error:  # it is someone's own code
        raise UserError(f"{name_of(dataset)}[{position}] raised {type(error).__name__}: {reason_of(error)}") from error


def first_item(dataset: Any) -> Any:
    """The item at the first position, as it is read later."""
    return _item(dataset, 0)


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """A block in which torch, NumPy and Python draw what they draw under `seed`; the caller's numbers go on as if nothing was."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def name_of(given: Any) -> str:
    """The name of a dataset or a loader of one, by its class."""
    return PREFIX + type(getattr(given, "dataset", given)).__name__


def positions_of(loader: DataLoader) -> Sequence[int]:
    """The positions in its dataset that a loader gives, each once, ascending. Raises `UserError` for a sampler without an end
    that leaves some out."""
    if isinstance(loader.sampler, (RandomSampler, SequentialSampler)) and len(loader.sampler) == len(loader.dataset):  # type: ignore[arg-type]
        if loader.batch_sampler is None or getattr(loader.batch_sampler, "sampler", None) is loader.sampler:
            return range(len(loader.dataset))  # type: ignore[arg-type]
    given = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    found, whole, drawn = set[int](), len(loader.dataset), 0  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):  # drawing an order must not disturb the caller's numbers
        for part in given:
            taken = part if isinstance(part, (list, tuple)) else [part]
            found.update(map(int, taken))
            drawn += len(taken)
            if len(found) >= whole:
                break
            if drawn > MOST_DRAWS * whole:
                raise UserError(f"the sampler of {name_of(loader)} does not end: give one that gives each image once")
    return sorted(found)


def gives_items(loader: DataLoader) -> bool:
    """Whether a loader gives the items of its dataset as they are: it collates as torch does, and iterates as torch or timm."""
    own = getattr(type(loader).__iter__, "__module__", "").partition(".")[0] in ("torch", "timm")
    return own and loader.collate_fn is default_collate


def indexed(dataset: Any, positions: Sequence[int], shape: Shape, report: Reporter) -> DatasetSet:
    """The images of a dataset at `positions`, read when needed; their labels are read now. Raises `UserError` for images of
    another shape (C, H, W) than `shape`."""
    name = name_of(dataset)
    if not len(positions):
        return DatasetSet(name, dataset, (), (), ())
    if (first := _readable(dataset, positions[0], name)) is not None:
        check_shape(first[0], shape, name)
    labels, digests = _labels(dataset, positions, name, report, shape)
    data = DatasetSet(name, dataset, positions, labels, class_names_of(dataset) or max(labels) + 1)
    data.digests, data.shape = digests, shape
    return data


def _readable(dataset: Any, position: int, name: str) -> tuple[Tensor, int] | None:
    """Image and label at a position; None where the image cannot be decoded, which is said when it is read for the work."""
    try:
        return item_of(_item(dataset, position), name)
    except UserError:  # a `ValueError` that is about all images
        raise
    except UNREADABLE:
        return None


def _labels(
    dataset: Any, positions: Sequence[int], name: str, report: Reporter, shape: Shape
) -> tuple[list[int], list[bytes]]:  # fmt: skip
    """The labels at some positions, from the dataset's list of them where it has one, else from every item in turn, with the
    hash of each image; of one that cannot be decoded no label, and a hash like no other."""
    targets = _targets(dataset)
    if targets is not None:
        return [label_of(targets[i], name) for i in positions], []
    labels: list[int] = []
    digests: list[bytes] = []
    report("labels", 0, len(positions))
    for i in positions:
        image, label = _readable(dataset, i, name) or (None, -1)
        if image is not None:
            check_shape(image, shape, f"{name}[{i}]")
        labels.append(label)
        digests.append(digest(image) if image is not None else f"{name}[{i}]".encode())
        report("labels", len(labels), len(positions))
    return labels, digests


def _targets(dataset: Any) -> Sequence[Any] | None:
    """The labels of torchvision's datasets, which are those of their items if nothing transforms them."""
    if isinstance(dataset, Subset):
        whole = _targets(dataset.dataset)
        return None if whole is None else [whole[int(i)] for i in dataset.indices]
    targets = getattr(dataset, "targets", None)
    plain = getattr(dataset, "target_transform", None) is None and getattr(dataset, "transforms", None) is not None
    if not plain or not isinstance(targets, (list, tuple, Tensor)) or len(targets) != len(dataset):
        return None
    return list(targets)


def _inside(dataset: Any) -> list[Any]:
    """A dataset and those that it takes its items from."""
    parts = [dataset]
    for part in parts:  # which grows on the way
        parts += [part.dataset] if isinstance(part, Subset) else part.datasets if isinstance(part, ConcatDataset) else []
    return parts


def names_not_taken(given: Any) -> list[str]:
    """A sentence about class names that are not taken, since something transforms the labels that they name."""
    dataset = given.dataset if isinstance(given, DataLoader) else given
    parts = _inside(dataset)
    if not any(getattr(part, "target_transform", None) is not None for part in parts):
        return []
    if not any(getattr(part, "classes", None) for part in parts):
        return []
    return [f"{name_of(given)} has a target_transform, so its class names are not taken: they name the labels before it; give "
            "those of the labels with classes=[...]"]  # fmt: skip


def class_names_of(given: Any) -> tuple[str, ...]:
    """Class names of a dataset, as torchvision keeps them; of several for one class the first. Raises `UserError` for
    joined datasets of different classes."""
    dataset = getattr(given, "dataset", given) if isinstance(given, DataLoader) else given
    if isinstance(dataset, ImageSet):
        return dataset.classes
    if any(getattr(part, "target_transform", None) is not None for part in _inside(dataset)):
        return ()  # they name what its labels were before
    if isinstance(dataset, Subset):
        return class_names_of(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        named = list(dict.fromkeys(names for names in map(class_names_of, dataset.datasets) if names))
        if len(named) > 1:
            raise UserError(
                f"{name_of(given)} joins datasets of different classes, {listed(named[0])} and {listed(named[1])}, so that a "
                "label means one class in one and another in the other; give datasets with the same classes"
            )
        return named[0] if named else ()
    classes = getattr(dataset, "classes", None)
    if not isinstance(classes, (list, tuple)):
        return ()
    names = tuple(item[0] if isinstance(item, (list, tuple)) and item else item for item in classes)
    return names if all(isinstance(name, str) for name in names) and len(set(names)) == len(names) else ()
