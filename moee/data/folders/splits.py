"""Where the training and the held-out images of a folder lie: `train/` and `val/` under any of their usual names.

A split that is taken for a class is trained on with its held-out images, so what cannot be told apart is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from timm.data.readers.img_extensions import get_img_extensions
from torchvision.datasets.folder import IMG_EXTENSIONS

from moee.data.class_names import class_name, listed
from moee.data.split_names import HELD_OUT, TRAINED, Names
from moee.errors import UserError

TYPES = {*IMG_EXTENSIONS, *get_img_extensions()}
NO_CLASSES = {"__MACOSX"}  # beside hidden ones: what archives leave
LAYOUT = "an image folder holds train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg, of which a fifth is held out"
INNER = 2  # folders between a class and splits inside it that are looked for


def find_splits(source: str, root: Path, wanted: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """The folders of `train` and `val` below `root`, and sentences about what was taken for them; no folders where `root` is not
    divided. `test` is held out where there is no `val`. Held-out images alone do where `wanted` has no train.

    Raises `UserError` where folders are named as splits are and cannot be told apart, or lie inside classes.
    """
    place = root
    notes: list[str] = []
    passed = set()
    while (real := os.path.realpath(place)) not in passed:  # a link that leads back up
        passed.add(real)
        folders = visible_folders(place)
        full = [f for f in folders if holds_images(place / f)]
        plain = _plain_pair(source, place, folders, full)
        if plain is not None:
            return _both(place, *plain, notes)
        names = Names(full)
        if len(full) > 1 and names.named:
            return _told(source, place, names, wanted, notes)
        if len(full) != 1:
            break
        kind = names.read[full[0]].kind if names.read[full[0]].plain else None
        if kind in TRAINED and not _holds_splits(place / full[0]):  # alone: a fifth of it is held out
            _refuse_inner(source, place / full[0])
            return {}, []
        if kind in HELD_OUT:
            return _held_out_alone(source, place, names, wanted, notes)
        place = place / full[0]
        notes.append(f"the splits lie in the folder {class_name(full[0])!r}")
    _refuse_inner(source, place)
    return {}, []


def _plain_pair(source: str, place: Path, folders: list[str], full: list[str]) -> tuple[str, str] | None:
    """The folders that are called train and val by nothing but one of their usual names, whatever lies beside them; such folders
    without images count where none has any."""
    pairs = []
    for names in (Names(folders), Names(full)):
        pairs.append((names.trained(plain=True), names.held_out(plain=True)))
    (train, held_out), (full_train, full_held_out) = pairs
    if not train or not held_out:
        return None
    return _only(source, place, full_train or train), _only(source, place, full_held_out or held_out)


def _told(
    source: str, place: Path, names: Names, wanted: Sequence[str], notes: list[str]
) -> tuple[dict[str, Path], list[str]]:  # fmt: skip
    """Which of several folders, some of them named as splits are, is which.

    Most folders with other names are classes, and so is what lies among them under such a name (a photograph of a train, `val`,
    `test_tube`), unless that holds classes itself.
    """
    pair, train, held_out = names.pair(), names.trained(), names.held_out()
    outnumbered = len(names.others) > len(names.named)
    doubtful = names.trained(plain=True) if outnumbered else [n for n in names.named if names.read[n].plain]
    if outnumbered and not any(_holds_classes(place / name) for name in doubtful):
        return _classes(source, place, names)
    if pair is not None:
        return _both(place, *pair, notes)
    if names.others and not names.trained(plain=True):
        if len(names.others) == len(names.named) or not any(_holds_classes(place / name) for name in doubtful):
            return _classes(source, place, names)
    elif not names.others and not train and held_out and all(names.read[name].plain for name in names.named):
        return _held_out_alone(source, place, names, wanted, notes)
    lacking = " and no val" if train and not held_out else " and no train" if held_out and not train else ""
    alone = f"give {place / train[0]} itself to divide it, " if len(train) == 1 and not held_out else ""
    raise UserError(
        f"{_came(source, place, [*names.named, *names.others])}{lacking}, which may be splits or classes: {alone}call the splits "
        f"train and val, or put classes into one folder called train; {LAYOUT}"
    )


def _classes(source: str, place: Path, names: Names) -> tuple[dict[str, Path], list[str]]:
    """What follows where the folders are classes, some of which are called as splits are."""
    _refuse_inner(source, place)
    called = [name for name in names.named if names.read[name].plain or names.read[name].kind in TRAINED]
    if not called:
        return {}, []
    taken = "is taken for a class" if len(called) == 1 else "are taken for classes"
    return {}, [f"{listed([class_name(name) for name in called])} {taken}, as {listed(names.others)} beside"]


def _held_out_alone(
    source: str, place: Path, names: Names, wanted: Sequence[str], notes: list[str]
) -> tuple[dict[str, Path], list[str]]:  # fmt: skip
    """Splits without train: enough where nothing is trained."""
    folders = list(names.read)
    if "train" in wanted:
        inner = f"give {place / folders[0]} itself to divide it" if len(folders) == 1 else "add one"
        raise UserError(f"{_came(source, place, folders)} and no train; {inner}; {LAYOUT}")
    split = _only(source, place, names.held_out())
    return {"val": place / split}, [*notes, f"{split!r} is held out, and there is no train"]


def _holds_classes(folder: Path) -> bool:
    """Whether the images of a folder lie in several folders of its own."""
    return sum(holds_images(folder / name) for name in visible_folders(folder)) > 1


def _holds_splits(folder: Path) -> bool:
    """Whether a folder holds train and val under nothing but their usual names."""
    names = Names(visible_folders(folder))
    return bool(names.trained(plain=True) and names.held_out(plain=True))


def _both(place: Path, train: str, held_out: str, notes: list[str]) -> tuple[dict[str, Path], list[str]]:
    splits = {"train": train, "val": held_out}
    if splits != {"train": "train", "val": "val"}:
        notes = [*notes, f"{splits['train']!r} is trained on and {splits['val']!r} is held out"]
    beside = [f for f in visible_folders(place) if f not in splits.values() and holds_images(place / f)]
    if beside:
        names = listed([class_name(f) for f in beside])
        notes = [*notes, f"images beside {splits['train']!r} and {splits['val']!r} are not read ({names})"]
    return {split: place / name for split, name in splits.items()}, notes


def _only(source: str, place: Path, folders: list[str]) -> str:
    if len(folders) > 1:
        raise UserError(f"{_came(source, place, folders)}, which may each be the same split; leave one of them; {LAYOUT}")
    return folders[0]


def _refuse_inner(source: str, place: Path) -> None:
    """Raise `UserError` where splits lie inside class folders: their images would be divided anew."""
    level = visible_folders(place)
    for _ in range(INNER):
        below = []
        for folder in level:
            inside = visible_folders(place / folder)
            if _holds_splits(place / folder) or Names(inside).pair() is not None:
                raise UserError(f"{_came(source, place, [folder])}, which holds splits of its own; {LAYOUT}")
            below += [f"{folder}/{name}" for name in inside]
        level = below


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
