"""What tells the files of a data set from others of the same names: what is in them, as far as it can be read in seconds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from moee.progress import Reporter, silent, track

# Names and sizes do not tell: uncompressed images of one shape have one size, and so have many small ones by chance. Nor do
# times of change: copies may keep them, or lose them though nothing changed. So a set that is read within a second or two is
# known by all its bytes, wherever it was copied. Of a larger one (1.3 million files take minutes) the times of all files must be
# the same, and the ends of some thousands spread over it: whoever puts other images in its place changes one of these.
WHOLE_BYTES = 1 << 28
SAMPLED_FILES, END_BYTES = 4096, 4096
BLOCK_BYTES = 1 << 20
COMPARED = "hash of the images"


@dataclass(frozen=True)
class Stored:
    """Where something lies: a file, or `size` bytes of one from the byte `start` on (-1: all that there are)."""

    path: str
    start: int = 0
    size: int = -1


def files_digest(paths: Sequence[str], root: str, report: Reporter = silent) -> bytes:
    """Hash of files by their paths below `root`, which may lie elsewhere the next time, sizes and content (see above)."""
    facts = [_facts(path) for path in paths]
    whole = sum(max(size, 0) for size, _ in facts) <= WHOLE_BYTES
    digest = hashlib.sha256()
    for path, (size, changed) in zip(paths, facts, strict=True):
        entry = f"{os.path.relpath(path, root)}\0{size}\0{'' if whole else changed}\n"
        digest.update(entry.encode(errors="surrogateescape"))
    read = paths if whole else spread(paths, SAMPLED_FILES)
    for path in track(read, COMPARED, len(read), report):
        _read(path, whole, digest)
    return digest.digest()


def spread(items: Sequence, count: int) -> Sequence:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _facts(path: str) -> tuple[int, int]:
    """Bytes and time of change of a file in nanoseconds; -1 for what cannot be looked at."""
    try:
        facts = os.stat(path)
    except OSError:
        return -1, -1
    return facts.st_size, facts.st_mtime_ns


def _read(path: str, whole: bool, digest) -> None:
    """Update `digest` by a file's bytes, or by its first and its last ones; by a mark where they cannot be read."""
    try:
        with open(path, "rb") as file:
            if not whole:
                digest.update(file.read(END_BYTES))
                file.seek(max(0, os.fstat(file.fileno()).st_size - END_BYTES))
                digest.update(file.read(END_BYTES))
                return
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    except OSError:
        digest.update(b"\0unreadable\0")
