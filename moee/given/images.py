"""Images that Python hands over: a DataLoader, a dataset, or anything that yields images and labels.

They come as the model takes them, float32 and normalised: whoever made the loader has prepared them. A dataset that can be
indexed is read image by image when it is needed; anything else is read once and kept in memory.
"""

from __future__ import annotations

import numbers
from collections.abc import Hashable, Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    default_collate,
)

from moee.data.class_names import listed
from moee.data.image_set import ImageSet, Source, TensorSet, divide
from moee.data.leaks import digest, refuse_shared, rows, same_content, sources_of
from moee.data.sources import numbered
from moee.errors import UserError
from moee.models.model import Shape
from moee.progress import Reporter, silent
from moee.schema import shown

PREFIX = "python:"  # of the name under which an artifact records such images: it cannot open them again
MAX_BYTES = 4 << 30  # of images that are kept in memory
IMAGE_KEYS, LABEL_KEYS = ("pixel_values", "image", "images"), ("labels", "label")  # of items that are dictionaries
EXPECTED = "expected pairs of an image and a label, images alone, or dictionaries with 'pixel_values' and 'labels'"


class DatasetSet(ImageSet):
    """The `positions` of a dataset that can be indexed. `labels` were read before; an item with another one is an error."""

    def __init__(self, name: str, dataset: Any, positions: Sequence[int], labels: Sequence[int], classes: Sequence[str] | int):
        super().__init__(name, list(labels), classes)
        self.dataset, self.positions, self.first = dataset, list(positions), list(labels)
        self.digests: list[bytes] = []  # of the images, if they were read for their labels

    def load(self, index: int) -> Tensor:
        image, label = item_of(self.dataset[self.positions[index]], self.name)
        if label != self.first[index]:
            raise UserError(
                f"{self.describe(index)} has the label {label}, and had {self.first[index]} before: a dataset must give an image "
                "the same label each time"
            )
        return image


def given_splits(
    train: Any, val: Any = None, *, shape: Shape, classes: Sequence[str] | None = None, head_classes: int | None = None,
    seed: int = 0, report: Reporter = silent, labels: Sequence[str] = (),
) -> tuple[ImageSet, ImageSet]:  # fmt: skip
    """The training and the held-out images of a DataLoader, a dataset, an `ImageSet`, a pair of tensors (images [N, C, H, W] and
    labels [N]), or any iterable of batches (images [B, C, H, W], labels [B]). Without `val` a fifth of `train`, drawn with
    `seed`, is held out.

    A loader's sampler says which images are taken; their order and repetitions do not count. Label i is the i-th of the
    dataset's `classes`, where it has such names, or the other split's; both are numbered alike, as `moee.data.sources` does,
    `labels` included.
    Raises `UserError` for images that are not of `shape`, or not float; for labels that are no numbers; for images that fill
    the memory; for held-out images that are training images. """
    if val is not None and val is train:
        refuse_shared([0], [0])
    sets, shared = {"train": _opened(train, shape, report)}, []
    if val is None:
        parts = divide(len(sets["train"]), seed)
        sets = {split: _part(sets["train"], positions) for split, positions in parts.items()}
    else:
        sets["val"] = _opened(val, shape, report)
        refuse_shared(_sources(sets["train"], train), _sources(sets["val"], val))
        shared = same_content(_digests(sets["train"]), _digests(sets["val"]))
    notes = [*shared, *_renamed(train), *(_renamed(val) if val is not None else [])]
    both = {split: given for split, given in (("train", train), ("val", val)) if given is not None}
    named = {split: _names(given) for split, given in both.items()}
    order = next((names for names in named.values() if names), ())
    for split, names in named.items():
        if order and not names and not _renamed(both[split]):
            sets[split].classes = tuple(
                order[i] if i < len(order) else str(i) for i in range(max(len(order), sets[split].num_classes))
            )
            notes.append(
                f"{split} has no class names: its labels are taken as positions in the other images' {len(order)} classes"
            )
    source = Source(sets, divided=val is not None, indices=not order, order=order, notes=notes)
    found = numbered(source, classes, head_classes, labels)
    return found["train"], found["val"]


def given_images(
    data: Any, *, shape: Shape, classes: Sequence[str] | None = None, head_classes: int | None = None, report: Reporter = silent
) -> ImageSet:
    """Held-out images alone, as `given_splits`; `classes` are those of an artifact."""
    names = _names(data)
    source = Source({"val": _opened(data, shape, report)}, indices=not names, order=names, notes=_renamed(data))
    return numbered(source, classes, head_classes)["val"]


def _sources(data: ImageSet, given: Any) -> list[Hashable]:
    """Where the images of an opened set come from; nothing where nobody knows."""
    if isinstance(data, DatasetSet):
        return sources_of(data.dataset, data.positions)
    if isinstance(given, (tuple, list)) and isinstance(given[0], Tensor) and given[0].ndim == 4:
        return rows(given[0])
    if isinstance(given, DataLoader) and not isinstance(given.dataset, IterableDataset):  # with a collate_fn of its own
        return sources_of(given.dataset, _positions(given))
    return rows(data.images) if isinstance(data, TensorSet) else [*getattr(data, "paths", ())]


def _digests(data: ImageSet) -> list[bytes]:
    """Hashes of the images, as far as they are in memory or were read before."""
    return [digest(image) for image in data.images] if isinstance(data, TensorSet) else getattr(data, "digests", [])


def _opened(given: Any, shape: Shape, report: Reporter) -> ImageSet:
    """An image set with the labels and names of what was given."""
    data = _as_set(given, shape, report)
    if not len(data):
        raise UserError(f"{data.name} has no images")
    return data


def _as_set(given: Any, shape: Shape, report: Reporter) -> ImageSet:
    if isinstance(given, ImageSet):
        return given
    if isinstance(given, (str, bytes)) or given is None:
        raise UserError(f"images came as {shown(given)}; expected a DataLoader, a dataset or an iterable of images and labels")
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(part, Tensor) for part in given):
        images, labels = given
        return _in_memory(_named(given), [(images, labels)], _names(given), shape)
    if isinstance(given, DataLoader) and not isinstance(given.dataset, IterableDataset) and given.collate_fn is default_collate:
        return _indexed(given.dataset, _positions(given), shape, report)
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset) and isinstance(given, Sized):
        return _indexed(given, range(len(given)), shape, report)
    if not isinstance(given, Iterable):
        came = type(given).__name__
        raise UserError(f"images came as {came}; expected a DataLoader, a dataset or an iterable of images and labels")
    return _in_memory(_named(given), given, _names(given), shape)


def _named(given: Any) -> str:
    return PREFIX + type(getattr(given, "dataset", given)).__name__


def _positions(loader: DataLoader) -> Sequence[int]:
    """The positions in its dataset that a loader gives, each once, ascending."""
    if isinstance(loader.sampler, (RandomSampler, SequentialSampler)) and len(loader.sampler) == len(loader.dataset):  # type: ignore[arg-type]
        if loader.batch_sampler is None or getattr(loader.batch_sampler, "sampler", None) is loader.sampler:
            return range(len(loader.dataset))  # type: ignore[arg-type]
    given = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    with torch.random.fork_rng(devices=[]):  # drawing an order must not disturb the caller's numbers
        flat = [int(i) for part in given for i in (part if isinstance(part, (list, tuple)) else [part])]
    return sorted(set(flat))


def _indexed(dataset: Any, positions: Sequence[int], shape: Shape, report: Reporter) -> DatasetSet:
    name = _named(dataset)
    if not len(positions):
        return DatasetSet(name, dataset, (), (), ())
    _check(item_of(dataset[positions[0]], name)[0], shape, name)
    labels, digests = _labels(dataset, positions, name, report)
    found = DatasetSet(name, dataset, positions, labels, _names(dataset) or max(labels) + 1)
    found.digests = digests
    return found


def _labels(dataset: Any, positions: Sequence[int], name: str, report: Reporter) -> tuple[list[int], list[bytes]]:
    """The labels at some positions, from the dataset's list of them where it has one, else from every item in turn, with the
    hash of each image."""
    targets = _targets(dataset)
    if targets is not None:
        return [_label(targets[i], name) for i in positions], []
    found: list[int] = []
    digests: list[bytes] = []
    report("labels", 0, len(positions))
    for i in positions:
        image, label = item_of(dataset[i], name)
        found.append(label)
        digests.append(digest(image))
        report("labels", len(found), len(positions))
    return found, digests


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


def _renamed(given: Any) -> list[str]:
    """A sentence about class names that are not taken, since something transforms the labels that they name."""
    dataset = given.dataset if isinstance(given, DataLoader) else given
    parts = _inside(dataset)
    if not any(getattr(part, "target_transform", None) is not None for part in parts):
        return []
    if not any(getattr(part, "classes", None) for part in parts):
        return []
    return [f"{_named(given)} has a target_transform, so its class names are not taken: they name the labels before it; give "
            "those of the labels with classes=[...]"]  # fmt: skip


def _names(given: Any) -> tuple[str, ...]:
    """Class names of a dataset, as torchvision keeps them; of several for one class the first."""
    dataset = getattr(given, "dataset", given) if isinstance(given, DataLoader) else given
    if isinstance(dataset, ImageSet):
        return dataset.classes
    if any(getattr(part, "target_transform", None) is not None for part in _inside(dataset)):
        return ()  # they name what its labels were before
    if isinstance(dataset, Subset):
        return _names(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        found = list(dict.fromkeys(names for names in map(_names, dataset.datasets) if names))
        if len(found) > 1:
            raise UserError(
                f"{_named(given)} joins datasets of different classes, {listed(found[0])} and {listed(found[1])}, so that a "
                "label means one class in one and another in the other; give datasets with the same classes"
            )
        return found[0] if found else ()
    classes = getattr(dataset, "classes", None)
    if not isinstance(classes, (list, tuple)):
        return ()
    names = tuple(item[0] if isinstance(item, (list, tuple)) and item else item for item in classes)
    return names if all(isinstance(name, str) for name in names) and len(set(names)) == len(names) else ()


def _in_memory(name: str, given: Iterable[Any], classes: tuple[str, ...], shape: Shape) -> TensorSet:
    """Everything that an iterable yields, batches or single images."""
    images: list[Tensor] = []
    labels: list[int] = []
    size = 0
    for item in given:
        batch, marks = _pair(item, name)
        if batch.ndim == len(shape):
            batch, marks = batch[None], [marks]
        _check(batch[0] if len(batch) else batch, shape, name) if len(batch) else None
        size += batch.numel() * 4
        if size > MAX_BYTES:
            raise UserError(
                f"{name} yields more than {MAX_BYTES >> 30} GiB of images, which would be kept in memory; give a dataset that "
                "can be indexed, or fewer images"
            )
        images.append(batch.detach().float().cpu())
        rows = [-1] * len(batch) if marks is None else list(marks)
        if len(rows) != len(batch):
            raise UserError(f"{name} yields {len(batch)} images with {len(rows)} labels; expected as many")
        labels += [-1 if mark is None else _label(mark, name) for mark in rows]
    whole = torch.cat(images) if images else torch.empty(0, *shape)
    return TensorSet(name, whole, labels, classes or max(labels, default=-1) + 1)


def _part(data: ImageSet, positions: Sequence[int]) -> ImageSet:
    """Some images of a set."""
    labels = [data.labels[i] for i in positions]
    if isinstance(data, DatasetSet):
        return DatasetSet(data.name, data.dataset, [data.positions[i] for i in positions], labels, data.classes)
    if isinstance(data, TensorSet):
        return TensorSet(data.name, data.images[list(positions)], labels, data.classes)
    raise UserError(f"{data.name} has no held-out images; give some")


def item_of(item: Any, name: str) -> tuple[Tensor, int]:
    """Image [C, H, W] and label (-1: none) of one item of a dataset. Raises `UserError` that says what came."""
    image, label = _pair(item, name)
    return image.float(), -1 if label is None else _label(label, name)


def _pair(item: Any, name: str) -> tuple[Tensor, Any]:
    if isinstance(item, Mapping):
        image = next((item[key] for key in IMAGE_KEYS if key in item), None)
        label = next((item[key] for key in LABEL_KEYS if key in item), None)
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        image, label = item
    elif isinstance(item, Tensor):
        image, label = item, None
    else:
        many = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise UserError(f"{name} yields {type(item).__name__}{many}; {EXPECTED}")
    if not isinstance(image, Tensor) or not image.is_floating_point():
        came = f"{image.dtype} tensors" if isinstance(image, Tensor) else type(image).__name__
        raise UserError(f"{name} yields images as {came}; expected float tensors, normalised as the model takes them")
    return image, label


def _label(label: Any, name: str) -> int:
    if isinstance(label, Tensor) and label.ndim == 0 and not label.is_floating_point():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, numbers.Integral) or not -1 <= int(label) < 1 << 31:
        raise UserError(f"{name} yields the label {shown(label)}; expected whole numbers from 0, or -1 for none")
    return int(label)


def _check(image: Tensor, shape: Shape, name: str) -> None:
    if tuple(image.shape) != tuple(shape):
        came, wanted = (" x ".join(map(str, sizes)) for sizes in (image.shape, shape))
        raise UserError(f"{name} yields images of {came}, the model takes {wanted}; change the transform, or give img_size")
