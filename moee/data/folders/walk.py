"""What lies below the folders of splits: every real folder once, whatever links lead to it."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moee.data.class_names import class_name
from moee.data.folders.splits import is_image, leads_to_folder, skipped
from moee.natural_order import natural_key
from moee.progress import Reporter, silent

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
        self.above = {inode_of(os.stat(parent)) for root in roots.values() for parent in root.resolve().parents}
        self.loops: list[str] = []
        self.doubles: list[tuple[str, str]] = []
        self.unlisted: list[str] = []
        self.others: Counter[str] = Counter()
        self._links: list[tuple[Listing, str]] = []
        for listing in self.listings.values():
            if not self._enter(listing, ""):
                self.doubles.append((listing.root, self.visited[inode_of(os.stat(listing.root))]))
        while self._links:
            listing, path = self._links.pop(0)
            inode = inode_of(os.stat(os.path.join(listing.root, path)))
            if inode in self.above:
                self.loops.append(os.path.join(listing.root, path))
            elif not self._enter(listing, path):
                self.doubles.append((os.path.join(listing.root, path), self.visited[inode]))
        for listing in self.listings.values():
            listing.images.sort(key=lambda image: natural_key(image[0]))

    def _enter(self, listing: Listing, path: str) -> bool:
        """List a folder and the real ones below it; False if it was visited before."""
        full = os.path.join(listing.root, path) if path else listing.root
        inode = inode_of(os.stat(full))
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
                    elif (below := inode_of(entry.stat(follow_symlinks=False))) in self.visited:  # mounted twice
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
                listing.images.append((name, inode_of(facts)))
            else:
                self.others["no file"] += 1


def inode_of(facts: os.stat_result) -> Inode:
    """What tells one file from another on this machine: device and inode."""
    return facts.st_dev, facts.st_ino
