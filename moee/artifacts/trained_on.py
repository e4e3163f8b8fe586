"""Held-out images that an earlier stage of an artifact was made with: on them it looks better than it is."""

from __future__ import annotations

import os
from collections.abc import Iterable

from moee.data import sources
from moee.data.folders.image_folder import FolderSet
from moee.data.image_set import ImageSet
from moee.data.transform import Transform
from moee.errors import UserError


def trained_on(folders: Iterable[str], source: str, held_out: ImageSet, transform: Transform, seed: int) -> list[str]:
    """A sentence for each of the `folders`, the data of an artifact's stages, whose training images are among the `held_out`
    ones of `source`. Of the same data other images are held out (`moee.artifacts.model.check_divisions`)."""
    if not isinstance(held_out, FolderSet):
        return []
    said = []
    for folder in dict.fromkeys(folders):
        if sources.source_of(folder) is not sources.FOLDERS or sources.same_data(folder, source) or not _meet(folder, held_out):
            continue
        try:
            train = sources.FOLDERS.open(folder, transform, ("train",), seed).splits["train"]
        except UserError:  # it is not what it was
            continue
        both = _files(train) & _files(held_out)
        if both:
            are = "is a training image" if len(both) == 1 else "are training images"
            said.append(
                f"{len(both)} of the {len(held_out)} held-out images {are} of {folder}, which the model was made on: on them "
                "it looks better than it is"
            )
    return said


def _meet(folder: str, held_out: FolderSet) -> bool:
    """Whether an image lies below a folder, whatever links lead there."""
    if not os.path.isdir(folder):
        return False
    root = os.path.join(os.path.realpath(folder), "")
    return any(os.path.realpath(path).startswith(root) for path in held_out.paths)


def _files(data: ImageSet) -> set[str]:
    assert isinstance(data, FolderSet), "folders alone are opened"
    return {os.path.realpath(path) for path in data.paths}
