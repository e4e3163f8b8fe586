"""A folder of images as a source: both its splits, with a sentence about everything that is not taken as it lies there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from PIL import Image
from torch import Tensor

from moee.data.class_names import class_name, listed
from moee.data.folders.doubles import count_images, said_of_doubles, take_apart, without_doubles
from moee.data.folders.splits import LAYOUT, TYPES, find_splits
from moee.data.folders.walk import Listing, Walk
from moee.data.image_set import Division, ImageSet, Source, divide
from moee.data.source import DataSource
from moee.data.transform import Transform, decoded, evaluation
from moee.errors import UserError
from moee.natural_order import in_order
from moee.progress import Reporter, silent
from moee.store.file_content import Stored, files_digest
from moee.store.wrong_folder import what_is_in


class Folders(DataSource):
    """An image folder: whatever has no other meaning is the path of one."""

    def takes(self, name: str) -> bool:
        return True

    def path(self, name: str) -> str:
        return name

    def open(self, name: str, transform: Transform, splits: Sequence[str], seed: int, report: Reporter = silent) -> Source:
        return open_folder(name, transform, splits, seed, report)


class FolderSet(ImageSet):
    """Images in files, `samples` by path and class name (None: none)."""

    def __init__(self, name: str, samples: Sequence[tuple[str, str | None]], transform: Transform):
        classes = in_order({label for _, label in samples if label is not None})
        numbers = {label: number for number, label in enumerate(classes)}
        super().__init__(name, [-1 if label is None else numbers[label] for _, label in samples], classes)
        self.paths = [path for path, _ in samples]
        self.transform, self.prepare = transform, evaluation(transform)

    def load(self, index: int) -> Tensor:
        return self.prepare(self.picture(index))

    def picture(self, index: int) -> Image.Image:
        return decoded(self.paths[index], self.transform)

    def describe(self, index: int) -> str:
        return self.paths[index]

    def stored(self, index: int) -> Stored:
        return Stored(self.paths[index])

    def content(self, report: Reporter = silent) -> bytes:
        return files_digest(self.paths, self.name, report)


def open_folder(source: str, transform: Transform, splits: Sequence[str], seed: int, report: Reporter = silent) -> Source:
    """Both splits of an image folder: `train/` and `val/` (see `moee.data.folders.splits`) below it, or a fifth of it held out,
    drawn with `seed`. Raises `UserError` where one of the wanted `splits` has no images, and for what is no folder."""
    root = Path(source)
    if not root.is_dir():
        came = "it is a file" if root.exists() else "there is no such folder"
        expected = "expected digits, photos, photo-crops, an image folder or a timm.data dataset string"
        raise UserError(f"data {source!r}: {came}; {expected}; {LAYOUT}")
    places, said = find_splits(source, root, splits)
    divided = bool(places)
    listings, notes = list_folder(source, places or {"all": root}, splits if divided else ("all",), report)
    notes = said + notes
    samples = {split: list(listing.paths()) for split, listing in listings.items()}
    if not divided:
        notes.append(
            "there is no train and val, so a fifth of the images is held out; a model trained on them answers too well"
        )
        whole = samples["all"]
        samples = {split: [whole[i] for i in part] for split, part in divide(len(whole), seed).items()}
    empty = sorted(set.union(*(listing.empty_classes() for listing in listings.values())))
    sets: dict[str, ImageSet] = {split: FolderSet(source, part, transform) for split, part in samples.items()}
    if not divided:
        division = Division.of(os.path.relpath(path, root) for path, _ in whole)
        for data in sets.values():
            data.division = division
    return Source(sets, divided, empty, notes=notes)


def list_folder(
    source: str, splits: Mapping[str, Path], wanted: Sequence[str], report: Reporter = silent
) -> tuple[dict[str, Listing], list[str]]:
    """The images of each split of `source`, and sentences about what was left out or taken in another way than it lies there.

    `splits` are their folders, or one folder that is divided later: then every real file is listed once. Raises `UserError`
    where one of the `wanted` has no image of its own.
    """
    walk = Walk(splits, report)
    listings, notes = walk.listings, _left_out(walk)
    for name, listing in listings.items():
        listings[name], doubles = without_doubles(listing)
        if doubles:
            notes.append(said_of_doubles(doubles, listings[name]))
    if len(listings) > 1:
        notes += take_apart(source, listings)
    for split, listing in listings.items():
        if split in wanted and not listing.images:
            came = what_is_in(source) or (notes[0] if notes else "")
            raise UserError(f"data {source!r}: no images found in {listing.root}{f' ({came})' if came else ''}; {LAYOUT}")
    wrapper = _wrapper(listings)
    if wrapper is not None:
        beside = [path for listing in listings.values() for path in listing.strays()]
        listings = {split: listing.below(wrapper) for split, listing in listings.items()}
        notes.append(f"all images lie in the folder {class_name(wrapper)!r}, so the folders below it are the classes")
        if beside:
            are = "is" if len(beside) == 1 else "are"
            notes.append(f"{count_images(len(beside))} beside it {are} left out ({listed(beside, False)})")
    else:
        notes += _unwrapped(listings)
    for split, listing in listings.items():
        strays = listing.strays()
        if strays and len(strays) < len(listing.images):
            where = f"of {split} " if len(listings) > 1 else ""
            have = "has" if len(strays) == 1 else "have"
            notes.append(f"{count_images(len(strays))} {where}beside the class folders {have} no label ({listed(strays, False)})")
    return listings, notes


def _left_out(walk: Walk) -> list[str]:
    notes = []
    if walk.doubles:
        path, first = walk.doubles[0]
        more = f" (and {len(walk.doubles) - 1} more such links)" if len(walk.doubles) > 1 else ""
        notes.append(f"{path} leads to {first}, which is read there{more}")
    if walk.loops:
        notes.append(f"links that lead back up were not followed ({listed(walk.loops, False)})")
    if walk.unlisted:
        notes.append(f"folders that may not be read were left out ({listed(walk.unlisted, False)})")
    if walk.others:
        kinds = ", ".join(f"{count} {kind or 'without ending'}" for kind, count in walk.others.most_common(3))
        notes.append(f"files of other types were left out ({kinds}); images are {', '.join(sorted(TYPES))}")
    return notes


def _wrapper(listings: Mapping[str, Listing]) -> str | None:
    """The folder that all images lie in, but for some right below the root, if several of its folders have images."""
    folders = {path.rpartition("/")[0] for listing in listings.values() for path, _ in listing.images} - {""}
    common = os.path.commonpath(folders) if folders else ""
    start = len(common) + 1
    classes = {folder[start:].partition("/")[0] for folder in folders if len(folder) > start}
    return common if common and len(classes) > 1 else None


def _unwrapped(listings: dict[str, Listing]) -> list[str]:
    """Take the folder away that a split has around its classes, where only without it the splits have classes of the same names;
    sentences if there was one."""
    wrappers = {split: _wrapper({split: listing}) for split, listing in listings.items()}
    choices = [((split, None), *([(split, folder)] if folder else [])) for split, folder in wrappers.items()]
    for choice in sorted(product(*choices), key=lambda taken: sum(folder is not None for _, folder in taken)):
        chosen = {split: listings[split].below(folder) if folder else listings[split] for split, folder in choice}
        if set.intersection(*(set(listing.counts()) for listing in chosen.values())):
            notes = []
            for split, folder in choice:
                if folder:
                    beside = len(listings[split].strays())
                    but = f" but {count_images(beside)}, which {'is' if beside == 1 else 'are'} left out" if beside else ""
                    said = f"all images of {split} lie in the folder {class_name(folder)!r}{but}"
                    notes.append(f"{said}, so the folders below it are its classes")
            listings.update(chosen)
            return notes
    return []
