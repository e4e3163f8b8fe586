"""Every source of images, one line each; opening one by its name, and numbering its classes alike in both splits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from moee.data.built_in import Digits, PhotoCrops, Photos
from moee.data.class_names import SYNSET, Labels, Numbering, listed, number_classes
from moee.data.folders.image_folder import Folders
from moee.data.image_set import ImageSet, Source
from moee.data.leaks import copied
from moee.data.shards import Shards
from moee.data.source import DataSource
from moee.data.timm_sets import TimmFolders, TimmSets
from moee.data.transform import Transform, mode_of
from moee.errors import UserError
from moee.progress import Reporter, silent

SOURCES: list[DataSource] = [
    Digits(),
    Photos(),
    PhotoCrops(),
    Shards(),
    TimmFolders(),
    TimmSets(),
]
FOLDERS = Folders()


def source_of(name: str) -> DataSource:
    """The source that a name is of."""
    return next((source for source in SOURCES if source.takes(name)), FOLDERS)


def load_splits(
    source: str, transform: Transform, seed: int = 0, classes: Sequence[str] | None = None, head_classes: int | None = None,
    *, report: Reporter = silent, labels: Sequence[str] = (),
) -> tuple[ImageSet, ImageSet]:  # fmt: skip
    """The training and the held-out images of a source, as `load_data`, their classes numbered alike.

    `labels` are the class names that the model itself brings: they number the classes where the source has the same names."""
    opened = _opened(source, transform, ("train", "val"), seed, report)
    found = numbered(opened, classes, head_classes, labels)
    return found["train"], found["val"]


def load_data(
    source: str, transform: Transform, split: str = "train", seed: int = 0, classes: Sequence[str] | None = None,
    *, head_classes: int | None = None, report: Reporter = silent,
) -> ImageSet:  # fmt: skip
    """Open `digits`, `photos` (or `photos:N`, N crops a photograph), `photo-crops`, an image folder, or a `timm.data`
    dataset string; `wds/FOLDER` is a folder of tar shards.

    `split` is `train` (calibration, fine-tuning) or `val` (held out). A folder is read as `train/` and `val/` below it
    where they exist; otherwise a fifth of it, drawn with `seed`, is held out. Classes are numbered by `classes`, those of an
    artifact, or alike in both splits, to fit the `head_classes` that a model tells apart (`class_names.number_classes`). Raises
    `UserError` for a source that is none of these, an empty folder, or one whose images cannot be listed.
    """
    if split not in ("train", "val"):
        raise UserError(f"unknown split {split!r}; expected train or val")
    return numbered(_opened(source, transform, (split,), seed, report), classes, head_classes)[split]


def same_data(source: str, other: str) -> bool:
    """Whether two names are of the same data; a folder may be spelled in many ways."""
    if source == other:
        return True
    one, two = (source_of(name).path(name) for name in (source, other))
    parts = {source_of(name).part(name) for name in (source, other)}
    return len(parts) == 1 and os.path.exists(one) and os.path.exists(two) and os.path.samefile(one, two)


def located(source: str) -> str:
    """`source` as it is recorded: a folder or file by its absolute path, so that a command in another folder takes no other one
    of that name; names of built-in data and of sets on a hub as they are."""
    return source_of(source).located(source)


def _opened(source: str, transform: Transform, splits: Sequence[str], seed: int, report: Reporter) -> Source:
    """A source with at least these splits."""
    mode_of(transform.shape)  # refuses channels that no file has
    if not source.strip():
        expected = "expected digits, photos, photo-crops, an image folder or a timm.data dataset string"
        raise UserError(f"the name of the data is empty; {expected}")
    opened = source_of(source).open(source, transform, splits, seed, report)
    if not {"train", "val"} <= opened.splits.keys():
        return opened
    return replace(opened, notes=[*opened.notes, *copied(opened.splits["train"], opened.splits["val"])])


def numbered(
    source: Source, classes: Sequence[str] | None, head_classes: int | None, labels: Sequence[str] = ()
) -> dict[str, ImageSet]:
    """The splits of a source with one numbering, which they get in place; what was guessed or has no number is in their notes."""
    counts = {split: data.counts() for split, data in source.splits.items()}
    train, val = counts.get("train", {}), counts.get("val", {})
    if not source.divided:
        train = val = {**val, **train}
    brought = Labels(labels).number
    names, said = [*train, *val], []
    if classes is None and labels and names and head_classes and not source.indices:
        shared = any(brought(name) >= 0 for name in names)
        standing = all(name.isdecimal() for name in names) or any(SYNSET.fullmatch(name) for name in names)
        if len(labels) != head_classes:
            said.append(f"the model names {len(labels)} classes and tells {head_classes} apart: its class numbers are guessed")
        elif shared or not standing:  # numbers and synsets say themselves which class they are
            classes = labels
            if not shared:
                said.append(
                    f"none of {listed(list(dict.fromkeys(names)))} is a class name of the model ({listed(labels)}): accuracy "
                    "cannot be compared; name them in the model's order with --class-map FILE"
                )
    if classes is not None:
        numbering, number, notes = Numbering(tuple(classes)), Labels(classes).number, list(source.notes)
        if source.indices and not any(name.isdecimal() for name in classes):
            number = lambda name: int(name) if int(name) < len(classes) else -1  # noqa: E731
            notes.append(f"class numbers are taken as positions in the model's {len(classes)} classes")
    else:
        numbering = number_classes(train, val, source.empty, head_classes, source.indices, order=source.order)
        number, notes = Labels(numbering.classes).number, [*source.notes, *numbering.notes]
    for split, data in source.splits.items():
        unknown = data.renumber(numbering.classes, number)
        if unknown and numbering.classes:
            which = f"none of the model's {len(numbering.classes)} classes" if classes is not None else f"in {split} alone"
            plural, images = len(unknown) > 1, sum(unknown.values())
            notes.append(f"{listed(list(unknown))} {'are' if plural else 'is'} {which}: {images} images of {split} have no label")
    trained = {-1, *map(number, train)}
    known = [name for name in val if number(name) not in trained] if classes is None and train else []
    if known:
        notes.append(f"only val has images of {listed(known)} ({sum(val[name] for name in known)})")
    for data in source.splits.values():
        data.notes = (*notes, *said)
    return source.splits
