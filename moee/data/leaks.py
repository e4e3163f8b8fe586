"""Images that are trained on and held out at once: an accuracy on them says nothing.

Which image it is, is told by where it comes from (a position of a dataset below its subsets, a file, a row of a tensor), and by
its content where the images are read anyway.
"""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from moee.errors import UserError
from moee.store.file_content import spread

LOOKED = 1024  # held-out files that are compared with training files
MOST_FILES = 1 << 16  # training files whose sizes are looked at
WHOLE_BYTES, END_BYTES = 1 << 20, 1 << 16
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


def _shared(train: Iterable[Hashable], val: Sequence[Hashable]) -> int:
    trained = set(train)
    return sum(image in trained for image in val)


def copied_files(train: Sequence[str], val: Sequence[str]) -> tuple[int, int]:
    """How many of the held-out files are copies of training files, byte for byte, and how many were looked at: some spread over
    all, none where there are so many training files that their sizes would take minutes to learn."""
    looked = spread(val, LOOKED) if len(train) <= MOST_FILES else ()
    sizes = {path: _size(path) for path in looked}
    wanted = {size for size in sizes.values() if size > 0}
    trained = {_content(path, size) for path in train if (size := _size(path)) in wanted}
    return sum(_content(path, size) in trained for path, size in sizes.items() if size > 0) if trained else 0, len(looked)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # it is named when it is read
        return -1


def _content(path: str, size: int) -> tuple[int, bytes]:
    """Size and hash of a file; of a large one of its ends."""
    try:
        with open(path, "rb") as file:
            if size <= WHOLE_BYTES:
                return size, hashlib.blake2b(file.read(), digest_size=16).digest()
            start = file.read(END_BYTES)
            file.seek(size - END_BYTES)
            return size, hashlib.blake2b(start + file.read(END_BYTES), digest_size=16).digest()
    except OSError:
        return size, path.encode(errors="surrogateescape")


def sources_of(dataset: Any, positions: Iterable[int]) -> list[Hashable]:
    """Where the images at some positions of a dataset come from."""
    found: list[Hashable] = []
    for position in positions:
        base, index = _base(dataset, int(position))
        samples = getattr(base, "samples", None)
        if isinstance(base, TensorDataset):
            found.append(_row(base.tensors[0], index))
        elif isinstance(samples, (list, tuple)) and len(samples) == len(base) and _is_file(samples[index]):
            found.append(os.path.abspath(samples[index][0]))
        else:
            found.append((id(base), index))
    return found


def rows(images: Tensor) -> list[Hashable]:
    """Where each image of a tensor [N, C, H, W] lies in memory."""
    return [_row(images, index) for index in range(len(images))]


def digest(image: Tensor) -> bytes:
    """Hash of an image as the model takes it."""
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


def _is_file(sample: Any) -> bool:
    return isinstance(sample, (list, tuple)) and len(sample) > 0 and isinstance(sample[0], (str, os.PathLike))
