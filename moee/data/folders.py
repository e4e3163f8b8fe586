"""Image folders: which images there are, and of which class.

A class is a folder right below the split, as torchvision's `ImageFolder` has it; what lies deeper belongs to it. Links are
followed, but a real folder is visited once and a link that leads back up never, so loops end; a real file is never in both
splits. Images beside the class folders have no class. Hidden folders are no classes.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from PIL import Image
from torch import Tensor

from moee.data.class_names import class_name, in_order, listed, natural_key
from moee.data.image_set import Division, ImageSet, Source, divide
from moee.data.leaks import copied_files
from moee.data.split_folders import LAYOUT, TYPES, find_splits, is_image, leads_to_folder, skipped
from moee.data.transform import Transform, decoded, evaluation
from moee.errors import UserError
from moee.progress import Reporter, silent
from moee.store.file_content import files_digest

STEP = 10_000  # files between two reports

Inode = tuple[int, int]  # device and number: what a file or folder really is


@dataclass
class Listing:
    """What lies below a split's folder `root`: relative paths of images with what each really is, and of folders."""

    root: str
    images: list[tuple[str, Inode | None]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    def of_class(self, path: str) -> str | None:
        """Name of the class of an image or a folder right below the root; None for an image beside the class folders."""
        top, slash, _ = path.partition("/")
        return class_name(top) if slash else None

    def empty_classes(self) -> set[str]:
        """Class folders that hold no image."""
        return {class_name(path) for path in self.folders if "/" not in path} - set(self.counts())

    def counts(self) -> Counter[str]:
        """Images of every class."""
        return Counter(name for path, _ in self.images if (name := self.of_class(path)) is not None)

    def strays(self) -> list[str]:
        """Images beside the class folders."""
        return [path for path, _ in self.images if "/" not in path]

    def below(self, folder: str) -> Listing:
        """What lies in one of its folders, which becomes the root."""
        start = f"{folder}/"
        images = [(path.removeprefix(start), inode) for path, inode in self.images if path.startswith(start)]
        folders = [path.removeprefix(start) for path in self.folders if path.startswith(start)]
        return Listing(os.path.join(self.root, folder), images, folders)

    def paths(self) -> Iterator[tuple[str, str | None]]:
        """Full path and class name of every image."""
        return ((os.path.join(self.root, path), self.of_class(path)) for path, _ in self.images)


class Walk:
    """Lists the images below several folders, each real folder once.

    First what really lies there, then what links lead to, so that a link never takes a folder from its own place.
    """

    def __init__(self, roots: Mapping[str, Path], report: Reporter = silent):
        self.listings = {split: Listing(str(root)) for split, root in roots.items()}
        self.report, self.files = report, 0
        self.visited: dict[Inode, str] = {}
        self.above = {_inode(os.stat(parent)) for root in roots.values() for parent in root.resolve().parents}
        self.loops: list[str] = []
        self.doubles: list[tuple[str, str]] = []
        self.unlisted: list[str] = []
        self.others: Counter[str] = Counter()
        self._links: list[tuple[Listing, str]] = []
        for listing in self.listings.values():
            if not self._enter(listing, ""):
                self.doubles.append((listing.root, self.visited[_inode(os.stat(listing.root))]))
        while self._links:
            listing, path = self._links.pop(0)
            inode = _inode(os.stat(os.path.join(listing.root, path)))
            if inode in self.above:
                self.loops.append(os.path.join(listing.root, path))
            elif not self._enter(listing, path):
                self.doubles.append((os.path.join(listing.root, path), self.visited[inode]))
        for listing in self.listings.values():
            listing.images.sort(key=lambda image: natural_key(image[0]))

    def _enter(self, listing: Listing, path: str) -> bool:
        """List a folder and the real ones below it; False if it was visited before."""
        full = os.path.join(listing.root, path) if path else listing.root
        inode = _inode(os.stat(full))
        if inode in self.visited:
            return False
        self.visited[inode] = full
        pending = [(path, inode[0])]
        while pending:
            folder, device = pending.pop()
            try:
                entries = sorted(os.scandir(os.path.join(listing.root, folder)), key=lambda entry: natural_key(entry.name))
            except OSError:
                self.unlisted.append(os.path.join(listing.root, folder))
                continue
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if skipped(entry.name):
                    continue
                if leads_to_folder(entry):
                    listing.folders.append(name)
                    if entry.is_symlink():
                        self._links.append((listing, name))
                    elif (below := _inode(entry.stat(follow_symlinks=False))) in self.visited:  # mounted twice
                        self.doubles.append((os.path.join(listing.root, name), self.visited[below]))
                    else:
                        self.visited[below] = os.path.join(listing.root, name)
                        pending.append((name, below[0]))
                else:
                    self._file(listing, name, entry, device)
        return True

    def _file(self, listing: Listing, name: str, entry: os.DirEntry[str], device: int) -> None:
        self.files += 1
        if self.files % STEP == 0:
            self.report("list images", self.files, 0)
        if not is_image(entry.name):
            kind = os.path.splitext(entry.name)[1].lower()
            self.others[kind] += 1
        elif not entry.is_symlink():
            if entry.is_file(follow_symlinks=False):
                listing.images.append((name, (device, entry.inode())))
            else:  # a pipe would be waited for
                self.others["no file"] += 1
        else:
            try:
                facts = entry.stat()
            except OSError:  # a link that leads nowhere: named when it is read
                listing.images.append((name, None))
                return
            if stat.S_ISREG(facts.st_mode):
                listing.images.append((name, _inode(facts)))
            else:
                self.others["no file"] += 1


def _inode(facts: os.stat_result) -> Inode:
    return facts.st_dev, facts.st_ino


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

    def content(self, report: Reporter = silent) -> bytes:
        return files_digest(self.paths, self.name, report)


def open_folder(source: str, transform: Transform, splits: Sequence[str], seed: int, report: Reporter = silent) -> Source:
    """Both splits of an image folder: `train/` and `val/` (see `moee.data.split_folders`) below it, or a fifth of it held out,
    drawn with `seed`. Raises `UserError` where one of the wanted `splits` has no images, and for what is no folder."""
    root = Path(source)
    if not root.is_dir():
        came = "it is a file" if root.exists() else "there is no such folder"
        expected = "expected digits, photos, an image folder or a timm.data dataset string"
        raise UserError(f"data {source!r}: {came}; {expected}; {LAYOUT}")
    places, said = find_splits(source, root, splits)
    divided = bool(places)
    listings, notes = list_folder(source, places or {"all": root}, splits if divided else ("all",), report)
    notes = said + notes
    samples = {split: list(listing.paths()) for split, listing in listings.items()}
    if not divided:
        notes.append("there is no train and val, so a fifth of the images is held out")
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
    if len(listings) == 1:
        (name, whole), = listings.items()
        kept, doubles = _once(whole)
        listings = {name: kept}
        if doubles:
            notes.append(f"{_images(len(doubles))} under a second name were left out ({listed(doubles, False)})")
    else:
        notes += _apart(source, listings)
    for split, listing in listings.items():
        if split in wanted and not listing.images:
            came = f" ({notes[0]})" if notes else ""
            raise UserError(f"data {source!r}: no images found in {listing.root}{came}; {LAYOUT}")
    wrapper = _wrapper(listings)
    if wrapper is not None:
        beside = [path for listing in listings.values() for path in listing.strays()]
        listings = {split: listing.below(wrapper) for split, listing in listings.items()}
        notes.append(f"all images lie in the folder {class_name(wrapper)!r}, so the folders below it are the classes")
        if beside:
            are = "is" if len(beside) == 1 else "are"
            notes.append(f"{_images(len(beside))} beside it {are} left out ({listed(beside, False)})")
    else:
        notes += _unwrapped(listings)
    for split, listing in listings.items():
        strays = listing.strays()
        if strays and len(strays) < len(listing.images):
            where = f"of {split} " if len(listings) > 1 else ""
            have = "has" if len(strays) == 1 else "have"
            notes.append(f"{_images(len(strays))} {where}beside the class folders {have} no label ({listed(strays, False)})")
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


def _once(listing: Listing) -> tuple[Listing, list[str]]:
    """The listing with every real file once, and the second names that were dropped."""
    seen: set[Inode] = set()
    kept: list[tuple[str, Inode | None]] = []
    doubles = []
    for path, inode in listing.images:
        if inode is not None and inode in seen:
            doubles.append(path)
            continue
        kept.append((path, inode))
        if inode is not None:
            seen.add(inode)
    return Listing(listing.root, kept, listing.folders), doubles


def _apart(source: str, listings: dict[str, Listing]) -> list[str]:
    """Take from train what val holds too, so that nothing held out is trained on; a sentence if there was any."""
    train, val = listings["train"], listings["val"]
    held_out = {inode for _, inode in val.images if inode is not None}
    kept = [image for image in train.images if image[1] is None or image[1] not in held_out]
    both = len(train.images) - len(kept)
    if not both:
        return _copied(train, val)
    if not kept:
        raise UserError(f"data {source!r}: every image of {train.root} is in {val.root} too; give val images of its own, or "
                        f"remove it and a fifth is held out")  # fmt: skip
    train.images = kept
    return [f"{_images(both)} in both train and val, under whatever name, {'is' if both == 1 else 'are'} not trained on",
            *_copied(train, val)]  # fmt: skip


def _copied(train: Listing, val: Listing) -> list[str]:
    """A sentence if held-out images are copies of training images."""
    both, looked = copied_files([path for path, _ in train.paths()], [path for path, _ in val.paths()])
    if not both:
        return []
    of = f"{looked} compared held-out images" if looked < len(val.images) else f"the {looked} held-out images"
    are = "is a copy" if both == 1 else "are copies"
    return [f"{both} of {of} {are} of training images, byte for byte: on them an accuracy says nothing"]


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
        found = {split: listings[split].below(folder) if folder else listings[split] for split, folder in choice}
        if set.intersection(*(set(listing.counts()) for listing in found.values())):
            notes = []
            for split, folder in choice:
                if folder:
                    beside = len(listings[split].strays())
                    but = f" but {_images(beside)}, which {'is' if beside == 1 else 'are'} left out" if beside else ""
                    said = f"all images of {split} lie in the folder {class_name(folder)!r}{but}"
                    notes.append(f"{said}, so the folders below it are its classes")
            listings.update(found)
            return notes
    return []


def _images(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"
