"""Images that Python hands over: a DataLoader, a dataset, or anything that yields images and labels.

They come as the model takes them, float32 and normalised: whoever made the loader has prepared them. A dataset that can be
indexed is read image by image when it is needed; anything else is read once and kept in memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
)

from moee.data.image_set import ImageSet, Source, TensorSet, divide, image_shape
from moee.data.leaks import digest, refuse_shared, repeated, rows, same_content, sources_of
from moee.data.sources import numbered
from moee.errors import UserError
from moee.given.datasets import (
    COMPARED,
    DatasetSet,
    class_names_of,
    first_item,
    gives_items,
    indexed,
    name_of,
    names_not_taken,
    positions_of,
)
from moee.given.items import check_shape, label_of, pair_of
from moee.models.model import Shape
from moee.progress import Reporter, silent
from moee.schema import shown

MAX_BYTES = 4 << 30  # of images that are kept in memory


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
        whole = sets["train"]
        sets = {split: _part(whole, positions) for split, positions in divide(len(whole), seed).items()}
        if len(whole) > 1:
            shared = same_content(_digests(sets["train"]), _digests(sets["val"]))
    else:
        sets["val"] = _opened(val, shape, report)
        refuse_shared(_sources(sets["train"], train), _sources(sets["val"], val))
        shared = same_content(_digests(sets["train"]), _digests(sets["val"]))
    _refuse_changing(sets["val"])
    if isinstance(sets["train"], DatasetSet) and (moving := sets["train"].changes()):
        shared.append(f"{moving}, and tuning matches outputs of the one that was read first")
    shared += repeated(_digests(sets["val"]))
    notes = [*shared, *names_not_taken(train), *(names_not_taken(val) if val is not None else [])]
    both = {split: given for split, given in (("train", train), ("val", val)) if given is not None}
    named = {split: class_names_of(given) for split, given in both.items()}
    order = next((names for names in named.values() if names), ())
    for split, names in named.items():
        if order and not names and not names_not_taken(both[split]):
            sets[split].classes = tuple(
                order[i] if i < len(order) else str(i) for i in range(max(len(order), sets[split].num_classes))
            )
            notes.append(
                f"{split} has no class names: its labels are taken as positions in the other images' {len(order)} classes"
            )
    source = Source(sets, divided=val is not None, indices=not order, order=order, notes=notes)
    splits = numbered(source, classes, head_classes, labels)
    return splits["train"], splits["val"]


def first_shape(given: Any) -> Shape | None:
    """The shape of the first image, where it can be looked at without using anything up."""
    if isinstance(given, (tuple, list)) and given and isinstance(given[0], Tensor) and given[0].ndim == 4:
        return image_shape(given[0])
    if isinstance(given, DataLoader):
        given = given.dataset if gives_items(given) else None
    if isinstance(given, ImageSet):
        return image_shape(given.load(0)[None]) if len(given) else None
    if not isinstance(given, Sized) or not hasattr(given, "__getitem__") or not len(given):
        return None
    try:
        image, _ = pair_of(first_item(given), name_of(given))
    except UserError:  # which is said when all are read
        return None
    return image_shape(image[None]) if image.ndim == 3 else None


def given_images(
    data: Any, *, shape: Shape, classes: Sequence[str] | None = None, head_classes: int | None = None, report: Reporter = silent
) -> ImageSet:
    """Held-out images alone, as `given_splits`; `classes` are those of an artifact."""
    names = class_names_of(data)
    held_out = _opened(data, shape, report)
    _refuse_changing(held_out)
    notes = [*repeated(_digests(held_out)), *names_not_taken(data)]
    source = Source({"val": held_out}, indices=not names, order=names, notes=notes)
    return numbered(source, classes, head_classes)["val"]


def _refuse_changing(held_out: ImageSet) -> None:
    """Raise `UserError` for held-out images that differ from read to read: two models would be compared on different ones."""
    if isinstance(held_out, DatasetSet) and (changes := held_out.changes()):
        raise UserError(f"{changes}, so {COMPARED}")
    if isinstance(held_out, DatasetSet):
        held_out.held_out = True


def _sources(data: ImageSet, given: Any) -> list[Hashable]:
    """Where the images of an opened set come from; nothing where nobody knows."""
    if isinstance(data, DatasetSet):
        return sources_of(data.dataset, data.positions)
    if isinstance(given, (tuple, list)) and isinstance(given[0], Tensor) and given[0].ndim == 4:
        return rows(given[0])
    if isinstance(given, DataLoader) and not isinstance(given.dataset, IterableDataset):  # with a collate_fn of its own
        return sources_of(given.dataset, positions_of(given))
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
        return _in_memory(name_of(given), [(images, labels)], class_names_of(given), shape)
    if isinstance(given, DataLoader) and not isinstance(given.dataset, IterableDataset) and gives_items(given):
        return indexed(given.dataset, positions_of(given), shape, report)
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset) and isinstance(given, Sized):
        return indexed(given, range(len(given)), shape, report)
    if not isinstance(given, Iterable):
        came = type(given).__name__
        raise UserError(f"images came as {came}; expected a DataLoader, a dataset or an iterable of images and labels")
    return _in_memory(name_of(given), given, class_names_of(given), shape)


def _in_memory(name: str, given: Iterable[Any], classes: tuple[str, ...], shape: Shape) -> TensorSet:
    """Everything that an iterable yields, batches or single images."""
    images: list[Tensor] = []
    labels: list[int] = []
    size = 0
    for item in given:
        batch, marks = pair_of(item, name)
        if batch.ndim == len(shape):
            batch, marks = batch[None], [marks]
        check_shape(batch[0] if len(batch) else batch, shape, name) if len(batch) else None
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
        labels += [-1 if mark is None else label_of(mark, name) for mark in rows]
    whole = torch.cat(images) if images else torch.empty(0, *shape)
    return TensorSet(name, whole, labels, classes or max(labels, default=-1) + 1)


def _part(data: ImageSet, positions: Sequence[int]) -> ImageSet:
    """Some images of a set."""
    labels = [data.labels[i] for i in positions]
    if isinstance(data, DatasetSet):
        part = DatasetSet(data.name, data.dataset, [data.positions[i] for i in positions], labels, data.classes)
        part.digests, part.shape = [data.digests[i] for i in positions] if data.digests else [], data.shape
        return part
    if isinstance(data, TensorSet):
        return TensorSet(data.name, data.images[list(positions)], labels, data.classes)
    raise UserError(f"{data.name} has no held-out images; give some")
