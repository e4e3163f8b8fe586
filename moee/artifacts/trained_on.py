"""Held-out images that an earlier stage of an artifact was made with: on them it looks better than it is."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable

from moee.data import sources
from moee.data.image_set import ImageSet
from moee.data.leaks import count_copies
from moee.data.transform import Transform
from moee.errors import MissingDependency, UserError
from moee.progress import Reporter, reported, silent

MANY = 10_000  # training images that take a while to look at


def trained_on(
    names: Iterable[str], source: str, held_out: ImageSet, transform: Transform, seed: int, *, report: Reporter = silent
) -> list[str]:
    """A sentence for each of the `names`, the data of an artifact's stages, whose training images, or copies of them, are among
    the `held_out` ones of `source`. Of the same data other images are held out (`moee.artifacts.model.check_divisions`)."""
    said = []
    for name in dict.fromkeys(names):
        opener = sources.source_of(name)
        place = opener.path(name)
        if opener.fetched or not place or not os.path.exists(place) or sources.same_data(name, source):
            continue
        try:
            train = opener.open(name, transform, ("train",), seed, report).splits["train"]
        except (UserError, MissingDependency):  # it is not what it was
            continue
        with reported(f"compare with the {len(train)} training images of {name}", report, len(train) >= MANY):
            same = _same(train, held_out, place)
            rest = [index for index in range(len(held_out)) if index not in same]
            copies, looked = count_copies(train, held_out, rest)
        if not same and not copies:
            continue
        both = len(same) + copies
        of = f"the {len(held_out)}" if looked == len(rest) or not copies else f"{len(same) + looked} compared"
        are = "is a training image" if both == 1 else "are training images"
        how = f", {copies} of them byte by byte under another name" if copies else ""
        said.append(
            f"{both} of {of} held-out images {are} of {name}{how}, which the model was made on: on them it looks too good"
        )
    return said


def _same(train: ImageSet, held_out: ImageSet, place: str) -> set[int]:
    """Positions of the held-out images that lie where training images do, whatever links lead there. `place` is around those."""
    root, real = os.path.realpath(place), functools.cache(os.path.realpath)
    found: dict[tuple[str, int], set[int]] = {}
    for index in range(len(held_out)):
        stored = held_out.stored(index)
        if stored is not None and real(stored.path).startswith(root):
            found.setdefault((real(stored.path), stored.start), set()).add(index)
    trained = (train.stored(index) for index in range(len(train))) if found else ()
    return {i for each in trained if each is not None for i in found.get((real(each.path), each.start), ())}
