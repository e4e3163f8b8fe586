"""Class numbers come from names: label i means `classes[i]`, in every split and in everything that an artifact becomes.

A head says how many classes it tells apart, never which. So folders are numbered as timm numbers them, natural order (2 before
10), from the first selection of folders that has as many as the head; what was guessed is said.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from timm.data import ImageNetInfo, infer_imagenet_subset

from moee.errors import printable
from moee.natural_order import natural_key

MAX_CLASSES = 1 << 15  # the largest ImageNet has 21,843
MAX_NAME = 255  # characters of a name, as of a file's
SYNSET = re.compile(r"n\d{8}")  # of WordNet, as ImageNet's folders are called
MAX_NAMED = 3  # names in a sentence; the others are counted
Counts = Mapping[str, int]  # class name to its number of images


@dataclass(frozen=True)
class Numbering:
    """`classes` in the order of their numbers, none where there are fewer than two, and `notes`: sentences about what was
    guessed."""

    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def number_classes(
    train: Counts, val: Counts, empty: Iterable[str] = (), head_classes: int | None = None, indices: bool = False,
    *, order: Sequence[str] = (),
) -> Numbering:  # fmt: skip
    """One numbering for both splits, from the images that each has of a class and the names of `empty` folders.

    The first of these that has `head_classes` classes is taken: the classes of train, of both splits, of both and the empty
    folders. Without a head, which leaves the numbers free, those of train. Names of ImageNet synsets are numbered as in the
    ImageNet that has so many classes, and plain numbers from 0 stand for themselves, where some of them lack; with `indices` all
    names are numbers already, and 0 may lack. `order`: all names as the source itself numbers them, instead of natural order.
    Two spellings of one text in Unicode are one class, which has the name of the first.
    """
    positions = {_normal(name): position for position, name in enumerate(order)}

    def ordered(names: Iterable[str]) -> tuple[str, ...]:
        once: dict[str, str] = {}
        for name in names:
            once.setdefault(_normal(name), name)
        return tuple(sorted(once.values(), key=lambda name: (positions.get(_normal(name), len(positions)), natural_key(name))))

    both = ordered([*train, *val])
    if len(both) > MAX_CLASSES:
        return Numbering((), (f"{len(both)} classes are more than {MAX_CLASSES}, so the images count as unlabelled",))
    everything = ordered([*both, *empty, *order])
    candidates = [(ordered(train), ""), (both, "train and val together"), (everything, "those without images included")]
    synsets = _synsets(both, head_classes)
    if synsets is not None and all(name in synsets.classes for name in both):
        return synsets
    for classes, where in candidates:
        if head_classes is not None and len(classes) == head_classes > 1:
            guess = f"classes are numbered over {where}, since the model has {head_classes} and train {len(candidates[0][0])}"
            notes = [guess] if where else []
            if indices and classes != tuple(map(str, range(head_classes))):
                notes.append(
                    f"class numbers {listed(classes)} are not 0 to {head_classes - 1}: in this order they are taken as "
                    f"the model's {head_classes} classes"
                )
            elif not order and classes != tuple(sorted(classes)):
                notes.append(f"classes are numbered in natural order, as timm does: {listed(classes)}")
            return Numbering(classes, tuple(notes))
    if synsets is not None:
        return synsets
    numbers = _numbers(everything, head_classes, indices)
    if numbers is not None:
        return numbers
    classes = candidates[0][0] if len(candidates[0][0]) > 1 else both
    return Numbering(classes if len(classes) > 1 else ())


def _synsets(names: tuple[str, ...], head_classes: int | None) -> Numbering | None:
    """The numbering of the ImageNet with so many classes, if it knows any of the names."""
    subset = infer_imagenet_subset({"num_classes": head_classes})
    if subset is None or not any(SYNSET.fullmatch(name) for name in names):
        return None
    classes = tuple(ImageNetInfo(subset).label_names())
    known = set(classes).intersection(names)
    note = f"folders are ImageNet synsets: numbered as in {subset}, {len(known)} of {head_classes} classes have images"
    return Numbering(classes, (note,) if len(known) < len(classes) else ()) if known else None


def _numbers(names: tuple[str, ...], head_classes: int | None, indices: bool) -> Numbering | None:
    """The classes of a head as numbers, if all names are numbers below its size: "7" and "42" then mean these."""
    if head_classes is None or not names or not all(name.isdecimal() and name.isascii() for name in names):
        return None
    width = len(names[0]) if len({len(name) for name in names}) == 1 else 1
    classes = tuple(f"{i:0{width}d}" for i in range(head_classes))
    if not set(names) <= set(classes) or not (indices or classes[0] in names):
        return None
    return Numbering(classes, (f"names are numbers: {listed(names)} are taken as these classes of {head_classes}",))


class Labels:
    """Looks names up in `classes`. Two spellings of one text in Unicode, as file systems have them, are the same name."""

    def __init__(self, classes: Sequence[str]):
        self._numbers = {_normal(name): number for number, name in enumerate(classes)}
        self._numbers |= {name: number for number, name in enumerate(classes)}

    def number(self, name: str) -> int:
        """The number of a class; -1 for one that the classes lack."""
        return self._numbers.get(name, self._numbers.get(_normal(name), -1))


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def class_name(raw: str) -> str:
    """A class name fit to be shown and written into configurations: characters that print nothing are spelt out, and what is too
    long for a manifest is cut and told apart by its hash."""
    name = raw if raw.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in raw)
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME - 9]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def listed(names: Sequence[str], quoted: bool = True) -> str:
    """Some names for a sentence: "'a', 'b', 'c' and 7 more". Characters that print nothing are spelt out."""
    spelt = ["".join(c if printable(c) else ascii(c)[1:-1] for c in name) for name in names[:MAX_NAMED]]
    shown = ", ".join(f"'{name}'" if quoted else name for name in spelt)
    more = len(names) - MAX_NAMED
    return f"{shown} and {more} more" if more > 0 else shown
