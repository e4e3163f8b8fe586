"""Image sets that `timm.data` opens by name: `torch/cifar10` of torchvision, `hfds/NAME` of Hugging Face; their own labels and
names of classes. A set of torchvision lies in a folder, by default the one in which the command runs: `torch/cifar10@FOLDER`
names it, and so it is recorded."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm.data
from PIL import Image
from torch import Tensor
from torchvision.datasets import DatasetFolder

from moee.data.class_names import class_name
from moee.data.image_set import SPLITS, ImageSet, Source
from moee.data.leaks import is_file_list
from moee.data.source import DataSource
from moee.data.transform import Transform, converted, decoded, evaluation
from moee.errors import MissingDependency, UserError
from moee.progress import Reporter, silent
from moee.schema import reason_of
from moee.store.file_content import Stored

INDEXED, STREAMS = ("torch", "hfds"), ("tfds", "hfids")
PACKAGES = {"hfds": "datasets"}


class TimmSets(DataSource):
    """Names that `timm.data` knows."""

    fetched = True

    def takes(self, name: str) -> bool:
        return "/" in name and name.partition("/")[0] in INDEXED + STREAMS and not Path(name).exists()

    def path(self, name: str) -> str:
        kind, _, rest = name.partition("/")
        if kind == "hfds":  # a folder goes before a set of the hub
            return rest if os.path.isdir(rest) else ""
        return rest.partition("@")[2] or os.curdir if kind == "torch" else ""

    def located(self, name: str) -> str:
        if name.partition("/")[0] != "torch":
            return super().located(name)
        return f"{self.part(name)}@{os.path.abspath(self.path(name))}"

    def part(self, name: str) -> str:
        return name.partition("@")[0] if name.partition("/")[0] == "torch" else ""

    def open(self, name: str, transform: Transform, splits: Sequence[str], seed: int, report: Reporter = silent) -> Source:
        return open_timm(name, transform)


class TimmFolders(TimmSets):
    """Those names that read image files of a folder, and nothing else."""

    fetched = False

    def takes(self, name: str) -> bool:
        return super().takes(name) and self.part(name) in ("torch/image_folder", "torch/folder")


class TimmSet(ImageSet):
    """A `timm.data` set whose images are found by position."""

    def __init__(self, name: str, dataset: Any, labels: list[int], classes: Sequence[str], transform: Transform):
        super().__init__(name, labels, classes)
        self.dataset, self.transform, self.prepare = dataset, transform, evaluation(transform)

    def load(self, index: int) -> Tensor:
        return self.prepare(self.picture(index))

    def picture(self, index: int) -> Image.Image:
        if not hasattr(self.dataset, "reader"):
            return converted(self.dataset[index][0], self.transform)
        # not dataset[index]: timm quietly returns the next image in the place of an unreadable one
        return decoded(self.dataset.reader[index][0], self.transform)

    def stored(self, index: int) -> Stored | None:
        samples = getattr(self.dataset, "samples", None)
        return Stored(str(samples[index][0])) if is_file_list(samples, len(self)) else None


def open_timm(source: str, transform: Transform) -> Source:
    """Both splits. Raises `UserError` for a set that cannot be opened or is a stream, `MissingDependency` if its reader lacks."""
    kind = source.partition("/")[0]
    if kind in STREAMS:
        cure = "write them into a folder, or into shards for wds/"
        raise UserError(f"data {source!r} is a stream, and images are read by position; {cure}")
    package = PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise MissingDependency(f"data {source!r} needs the package {package}; install it with pip install {package}")
    root = TimmSets().path(source) if kind == "torch" else os.curdir
    if not os.path.isdir(root):
        raise UserError(f"data {source!r}: {root} is no folder; give the one that the set lies in, such as torch/cifar10@FOLDER")
    opened = {split: _opened(source, root, names) for split, names in SPLITS.items()}
    _refuse_overlap(source, opened["train"], opened["val"])
    targets = {split: _targets(dataset) for split, dataset in opened.items()}
    own = _names(opened["train"])
    unnamed = own is None
    if own is None:
        numbers = sorted({target for part in targets.values() for target in part if target >= 0})
        names: tuple[str, ...] = tuple(map(str, numbers))
        places = {split: {number: place for place, number in enumerate(numbers)} for split in targets}
    else:
        # a split may number its classes itself, as torchvision's ImageFolder does: val's numbers mean val's names
        named = {"train": own, "val": _names(opened["val"]) or own}
        names = tuple(dict.fromkeys([*own, *named["val"]]))
        place_of = {name: place for place, name in enumerate(names)}
        places = {split: {i: place_of[name] for i, name in enumerate(of_split)} for split, of_split in named.items()}
    sets: dict[str, ImageSet] = {}
    for split, dataset in opened.items():
        labels = [places[split].get(target, -1) for target in targets[split]]
        sets[split] = TimmSet(source, dataset, labels, names, transform)
    return Source(sets, order=() if unnamed else names, indices=unnamed)


def _refuse_overlap(source: str, train: Any, val: Any) -> None:
    """Raise `UserError` if torchvision's `ImageFolder` took one folder for both splits, or one that lies in the other: timm gives
    it the folder above where a split has none of its own."""
    roots = [dataset.root for dataset in (train, val) if isinstance(dataset, DatasetFolder)]
    if len(roots) < 2:
        return
    inner, outer = sorted((Path(root).resolve() for root in roots), key=lambda path: len(path.parts), reverse=True)
    if inner.is_relative_to(outer):
        raise UserError(
            f"data {source!r} reads folders train and val, and {os.path.abspath(TimmSets().path(source))} lacks one of them, "
            "so images would be both trained on and held out; give the folder itself with --data"
        )


def _opened(source: str, root: str, splits: Sequence[str]) -> Any:
    """The first of these splits that there is."""
    reasons = []
    for split in splits:
        try:
            dataset: Any = timm.data.create_dataset(TimmSets().part(source) or source, root=root, split=split)
            if len(dataset):
                return dataset
            reasons.append(f"its split {split} is empty")
        except Exception as error:  # readers of many libraries, each with errors of its own
            reasons.append(reason_of(error))
    raise UserError(f"data {source!r}: no images found ({reasons[0]})")


def _names(dataset: Any) -> tuple[str, ...] | None:
    """Names of the classes by number, as the set has them; None if it has none, or gives one to two classes."""
    numbers = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if numbers:
        given: Any = [name for name, _ in sorted(numbers.items(), key=lambda item: item[1])]
        given = given if sorted(numbers.values()) == list(range(len(given))) else []
    else:
        given = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None) or []
    names = tuple(class_name(str(name)) for name in given)
    return names if names and len(set(names)) == len(names) and all(names) else None


def _targets(dataset: Any) -> list[int]:
    """A number an image; -1 where there is none, or several."""
    reader: Any = getattr(dataset, "reader", None)
    if hasattr(reader, "iter_targets"):
        given = reader.iter_targets()
    elif hasattr(reader, "label_key"):  # older timm
        given = reader.dataset[reader.label_key]
    else:
        given = getattr(dataset, "targets", [None] * len(dataset))
    return [_number(target) for target in given]


def _number(target: Any) -> int:
    try:
        return max(-1, int(target))
    except (TypeError, ValueError):
        return -1
