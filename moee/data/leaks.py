"""Images that are trained on and held out at once: an accuracy on them says nothing.

Which image it is, is told by where it comes from (a position of a dataset below its subsets, a file, a row of a tensor), and by
its content where the images are read anyway. Copies of files, and of members of shards, are told by size, then by their
ends, then by all of their bytes, so that few are read.
"""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Any, TypeGuard

from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from moee.data.image_set import ImageSet
from moee.errors import UserError
from moee.store.file_content import Stored, spread

LOOKED = 1024  # held-out files that are compared with training files
MOST_FILES = 1 << 16  # training files whose sizes are looked at
WHOLE_BYTES, END_BYTES, LITTLE_BYTES = 1 << 20, 1 << 16, 1 << 12
NOWHERE = Stored("")
CURE = "give others, or leave them out to hold out a fifth"


def refuse_shared(train: Iterable[Hashable], val: Sequence[Hashable]) -> None:
    """Raise `UserError` if any of the held-out images, told by where they come from, is a training image."""
    both = _shared(train, val)
    if both == len(val) > 0:
        raise UserError(f"the held-out images are the training images; {CURE}")
    if both:
        raise UserError(f"{both} of the {len(val)} held-out images are training images; {CURE}")


def same_content(train: Iterable[bytes], val: Sequence[bytes]) -> list[str]:
    """A sentence if some held-out images are training images byte by byte. Raises `UserError` if all are."""
    both = _shared(train, val)
    if both == len(val) > 0:
        raise UserError(f"every held-out image is byte by byte a training image; {CURE}")
    are = "is" if both == 1 else "are"
    return [f"{both} of the {len(val)} held-out images {are} byte by byte among the training images"] if both else []


def repeated(val: Sequence[bytes]) -> list[str]:
    """A sentence if some held-out images are there several times."""
    again = len(val) - len(set(val))
    if not again:
        return []
    are = "is" if again == 1 else "are"
    return [f"{again} of the {len(val)} held-out images {are} there before, byte by byte, so intervals come out too narrow"]


def _shared(train: Iterable[Hashable], val: Sequence[Hashable]) -> int:
    trained = set(train)
    return sum(image in trained for image in val)


def copied(train: ImageSet, val: ImageSet) -> list[str]:
    """A sentence if held-out images are copies of training images, in whatever files they lie."""
    both, looked = count_copies(train, val, range(len(val)))
    if not both:
        return []
    of = f"{looked} compared held-out images" if looked < len(val) else f"the {looked} held-out images"
    are = "is a copy" if both == 1 else "are copies"
    return [f"{both} of {of} {are} of training images, byte for byte: on them an accuracy says nothing"]


def count_copies(train: ImageSet, val: ImageSet, positions: Sequence[int]) -> tuple[int, int]:
    """How many of the held-out images at `positions` are copies of training images, byte for byte, and how many were looked at:
    some spread over all, none that lies in no file, none where there are so many training files that learning their sizes would
    take minutes."""
    looked = [place for index in spread(positions, LOOKED) if (place := _sized(val.stored(index))).size > 0]
    if not looked or len(train) > MOST_FILES and (train.stored(0) or NOWHERE).size < 0:
        return 0, 0
    held_out, trained = looked, [_sized(train.stored(index)) for index in range(len(train))]
    for most in (0, LITTLE_BYTES, WHOLE_BYTES):
        told = partial(_content, most=most)
        wanted = {told(place) for place in held_out}
        trained = [place for place in trained if told(place) in wanted]
        known = {told(place) for place in trained}
        held_out = [place for place in held_out if told(place) in known]
        if not held_out:
            break
    return len(held_out), len(looked)


def _sized(place: Stored | None) -> Stored:
    """With its size; -1 for what lies nowhere or cannot be looked at."""
    if place is None or place.size >= 0:
        return place or NOWHERE
    try:
        return Stored(place.path, 0, os.stat(place.path).st_size)
    except OSError:  # it is named when it is read
        return NOWHERE


def _content(place: Stored, most: int) -> tuple[int, bytes]:
    """The size of an image in bytes and their hash; of more than `most` that of a part of both ends."""
    if not most:
        return place.size, b""
    ends = place.size if place.size <= most else min(END_BYTES, most // 2)
    try:
        with open(place.path, "rb") as file:
            file.seek(place.start)
            digest = hashlib.blake2b(file.read(ends), digest_size=16)
            if ends < place.size:
                file.seek(place.start + place.size - ends)
                digest.update(file.read(ends))
        return place.size, digest.digest()
    except OSError:
        return place.size, repr(place).encode(errors="surrogateescape")


def sources_of(dataset: Any, positions: Iterable[int]) -> list[Hashable]:
    """Where the images at some positions of a dataset come from."""
    found: list[Hashable] = []
    for position in positions:
        base, index = _base(dataset, int(position))
        samples = getattr(base, "samples", None)
        if isinstance(base, TensorDataset):
            found.append(_row(base.tensors[0], index))
        elif is_file_list(samples, len(base)):
            found.append(os.path.abspath(samples[index][0]))
        else:
            found.append((id(base), index))
    return found


def rows(images: Tensor) -> list[Hashable]:
    """Where each image of a tensor [N, C, H, W] lies in memory."""
    return [_row(images, index) for index in range(len(images))]


def digest(image: Tensor) -> bytes:
    """Hash of an image [C, H, W] as the model takes it."""
    return hashlib.blake2b(image.detach().float().cpu().contiguous().numpy().data, digest_size=16).digest()


def _row(tensor: Tensor, index: int) -> Hashable:
    return "row", str(tensor.device), tensor.data_ptr() + index * tensor.stride(0) * tensor.element_size()


def _base(dataset: Any, index: int) -> tuple[Any, int]:
    """The dataset below subsets and concatenations, and the position there."""
    while isinstance(dataset, (Subset, ConcatDataset)):
        index = index % len(dataset)
        if isinstance(dataset, Subset):
            dataset, index = dataset.dataset, int(dataset.indices[index])
        else:
            part = bisect.bisect_right(dataset.cumulative_sizes, index)
            dataset, index = dataset.datasets[part], index - (dataset.cumulative_sizes[part - 1] if part else 0)
    return dataset, index % len(dataset)


def is_file_list(samples: Any, count: int) -> TypeGuard[Sequence[Any]]:
    """Whether these are `count` files, each before its label, as torchvision's `ImageFolder` has them."""
    if not isinstance(samples, (list, tuple)) or len(samples) != count or not count:
        return False
    return isinstance(samples[0], (list, tuple)) and len(samples[0]) > 0 and isinstance(samples[0][0], (str, os.PathLike))
