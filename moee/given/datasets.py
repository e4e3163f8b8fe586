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
)

from moee.data.class_names import listed
from moee.data.image_set import UNREADABLE, ImageSet
from moee.data.leaks import digest
from moee.errors import UserError
from moee.given.items import check_shape, item_of, label_of
from moee.models.model import Shape
from moee.progress import Reporter

PREFIX = "python:"  # of the name under which an artifact records such images: it cannot open them again


READ_TWICE = 16  # images of a dataset, to see that they stay as they are


class DatasetSet(ImageSet):
    """The `positions` of a dataset that can be indexed. `labels` were read before; an item with another one is an error. What a
    transform draws at random is drawn the same at every read: an image has one view."""

    def __init__(self, name: str, dataset: Any, positions: Sequence[int], labels: Sequence[int], classes: Sequence[str] | int):
        super().__init__(name, list(labels), classes)
        self.dataset, self.positions, self.first = dataset, list(positions), list(labels)
        self.digests: list[bytes] = []  # of the images, if they were read for their labels

    def load(self, index: int) -> Tensor:
        image, label = item_of(_item(self.dataset, self.positions[index]), self.name)
        if label != self.first[index]:
            raise UserError(
                f"{self.describe(index)} has the label {label}, and had {self.first[index]} before: a dataset must give an image "
                "the same label each time"
            )
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
                return f"{self.describe(index)} is another image at each read"
        return ""


def _item(dataset: Any, position: int) -> Any:
    """An item of a dataset, made with the random numbers that belong to its position."""
    with _drawing(position):
        return dataset[position]


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
    return PREFIX + type(getattr(given, "dataset", given)).__name__


def positions_of(loader: DataLoader) -> Sequence[int]:
    """The positions in its dataset that a loader gives, each once, ascending."""
    if isinstance(loader.sampler, (RandomSampler, SequentialSampler)) and len(loader.sampler) == len(loader.dataset):  # type: ignore[arg-type]
        if loader.batch_sampler is None or getattr(loader.batch_sampler, "sampler", None) is loader.sampler:
            return range(len(loader.dataset))  # type: ignore[arg-type]
    given = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    with torch.random.fork_rng(devices=[]):  # drawing an order must not disturb the caller's numbers
        flat = [int(i) for part in given for i in (part if isinstance(part, (list, tuple)) else [part])]
    return sorted(set(flat))


def indexed(dataset: Any, positions: Sequence[int], shape: Shape, report: Reporter) -> DatasetSet:
    name = name_of(dataset)
    if not len(positions):
        return DatasetSet(name, dataset, (), (), ())
    check_shape(item_of(_item(dataset, positions[0]), name)[0], shape, name)
    labels, digests = _labels(dataset, positions, name, report)
    data = DatasetSet(name, dataset, positions, labels, class_names_of(dataset) or max(labels) + 1)
    data.digests = digests
    return data


def _labels(dataset: Any, positions: Sequence[int], name: str, report: Reporter) -> tuple[list[int], list[bytes]]:
    """The labels at some positions, from the dataset's list of them where it has one, else from every item in turn, with the
    hash of each image."""
    targets = _targets(dataset)
    if targets is not None:
        return [label_of(targets[i], name) for i in positions], []
    labels: list[int] = []
    digests: list[bytes] = []
    report("labels", 0, len(positions))
    for i in positions:
        image, label = item_of(_item(dataset, i), name)
        labels.append(label)
        digests.append(digest(image))
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
    """Class names of a dataset, as torchvision keeps them; of several for one class the first."""
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
