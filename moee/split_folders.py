"""Where the training and the held-out images of a folder lie: `train/` and `val/` under any of their usual names.

A split that is taken for a class is trained on with its held-out images, so what cannot be told apart is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from timm.data.readers.img_extensions import get_img_extensions
from torchvision.datasets.folder import IMG_EXTENSIONS

from moee.class_names import class_name, listed
from moee.errors import UserError

TYPES = {*IMG_EXTENSIONS, *get_img_extensions()}
NO_CLASSES = {"__MACOSX"}  # beside hidden ones: what archives leave
LAYOUT = "an image folder holds train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg, of which a fifth is held out"
KINDS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
ENDING = r"[-_ ]?(\d+|set|split|data|images|imgs)?"  # train2017, val_set, test_images
MOST_WRAPPERS = 4  # folders around the splits


def find_splits(source: str, root: Path, wanted: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """The folders of `train` and `val` below `root`, and sentences about what was taken for them; nothing where `root` is not
    divided. `test` is held out where there is no `val`. Held-out images alone do where `wanted` has no train.

    Raises `UserError` where folders are named as splits are and cannot be told apart, or lie inside classes.
    """
    place = root
    notes: list[str] = []
    for _ in range(MOST_WRAPPERS):
        folders = visible_folders(place)
        kinds = {kind: [f for f in folders if split_of(f) == kind] for kind in KINDS}
        held_out = kinds["val"] or kinds["test"]
        if kinds["train"] and held_out:
            return _both(source, place, kinds["train"], held_out, notes)
        full = [f for f in folders if holds_images(place / f)]
        named = [f for f in full if split_of(f)]
        if named and named == full:
            if kinds["train"] or "train" in wanted:
                if len(full) == 1 and kinds["train"]:
                    return {}, []  # train alone: a fifth of it is held out
                if kinds["train"]:
                    raise UserError(f"{_came(source, place, full)} and no val; {LAYOUT}")
                inner = f"give {place / full[0]} itself to divide it" if len(full) == 1 else "add one"
                raise UserError(f"{_came(source, place, full)} and no train; {inner}; {LAYOUT}")
            split = _only(source, place, held_out)
            return {"val": place / split}, [*notes, f"{split!r} is held out, and there is no train"]
        if len(full) != 1 or named:
            break
        place = place / full[0]
        notes.append(f"the splits lie in the folder {class_name(full[0])!r}")
    _refuse_inner(source, root)
    return {}, []


def split_of(folder: str) -> str | None:
    """Which split a folder's name stands for: train, val or test; None for another name."""
    return next((k for k, words in KINDS.items() if re.fullmatch(f"({'|'.join(words)}){ENDING}", folder.lower())), None)


def _both(source: str, place: Path, train: list[str], held_out: list[str], notes: list[str]) -> tuple[dict[str, Path], list[str]]:
    found = {"train": _only(source, place, train), "val": _only(source, place, held_out)}
    if found != {"train": "train", "val": "val"}:
        notes = [*notes, f"{found['train']!r} is trained on and {found['val']!r} is held out"]
    beside = [f for f in visible_folders(place) if f not in found.values() and holds_images(place / f)]
    if beside:
        names = listed([class_name(f) for f in beside])
        notes = [*notes, f"images beside {found['train']!r} and {found['val']!r} are not read ({names})"]
    return {split: place / name for split, name in found.items()}, notes


def _only(source: str, place: Path, folders: list[str]) -> str:
    if len(folders) > 1:
        raise UserError(f"{_came(source, place, folders)}, which may each be the same split; leave one of them; {LAYOUT}")
    return folders[0]


def _refuse_inner(source: str, root: Path) -> None:
    """Raise `UserError` where splits lie inside class folders: their images would be divided anew."""
    for folder in visible_folders(root):
        inner = {kind for f in visible_folders(root / folder) if (kind := split_of(f))}
        if "train" in inner and len(inner) > 1:
            raise UserError(f"{_came(source, root, [folder])}, which holds splits of its own; {LAYOUT}")


def _came(source: str, place: Path, folders: list[str]) -> str:
    return f"data {source!r}: {place} holds {listed([class_name(f) for f in folders])}"


def visible_folders(folder: Path) -> list[str]:
    """Names of the folders that may be splits or classes."""
    try:
        entries = list(os.scandir(folder))
    except OSError:  # said when it is listed
        return []
    return sorted(e.name for e in entries if not skipped(e.name) and leads_to_folder(e))


def holds_images(folder: Path) -> bool:
    """Whether any image lies below. A link to a folder counts as one, since it may lead anywhere."""
    pending = [os.fspath(folder)]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if skipped(entry.name):
                        continue
                    if not leads_to_folder(entry):
                        if is_image(entry.name):
                            return True
                    elif entry.is_symlink():
                        return True
                    else:
                        pending.append(entry.path)
        except OSError:
            continue
    return False


def skipped(name: str) -> bool:
    """Whether a file or folder is no part of a data set by its name."""
    return name.startswith(".") or name in NO_CLASSES


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's does."""
    return os.path.splitext(name)[1].lower() in TYPES


def leads_to_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
