"""What an interrupted run leaves, and who may go on from it: only a run that would make the same."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moee.data.image_set import ImageSet
from moee.errors import UserError
from moee.progress import Reporter, silent
from moee.schema import shown
from moee.store.artifact import read_json, write_json
from moee.store.cache import cache_dir
from moee.store.leftovers import sweep_all

CONTENT = "bytes:"  # of a fingerprint, before its digits
OUTDATED = "which knew its images by names and sizes alone, so they may be others now"
SHOWN = 60  # characters of a differing value in a message
ANSWERS = "answers"  # of an identity: what a model of someone's own code gives, which is the same but for float noise
ALIKE = 1e-2  # of their root mean square: another machine adds up in another order, and a token may find another expert


@contextmanager
def alone_on(place: Path, leader: bool = True) -> Iterator[None]:
    """A block in which no other run of this user on this machine works on the state at `place`; the lock ends with the process.

    Raises `UserError` where another run does. Where the cache's file system has no locks nothing is held, and neither is it by
    ranks other than the `leader`.
    """
    if not leader:
        yield
        return
    digest = hashlib.sha256(os.path.realpath(place).encode(errors="surrogateescape")).hexdigest()[:16]
    path = cache_dir() / "locks" / f"state-{digest}.lock"
    try:
        descriptor = _locked(path)
    except BlockingIOError:
        name = shown(str(place).removesuffix(".resume"), quoted=False)
        raise UserError(f"another run is working on {name} at this moment; wait for it, or choose another place") from None
    except OSError:  # a cache that cannot be written to, or a file system without locks
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who opened it meanwhile finds that it is no longer the file of this name
        os.close(descriptor)


def _locked(path: Path) -> int:
    """Descriptor of the file at `path`, which is made where there is none, with the lock on it. Raises `OSError` without it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:  # its holder ended between the two
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def check_identity(
    path: Path, schema: str, identity: dict[str, Any], what: str, cure: str, *, said: dict[str, Any] | None = None
) -> None:  # fmt: skip
    """Write `identity` to `path`, or hold it against the one that is there. What is `said` is written too, and not compared.

    Raises `UserError` that names the first difference, with both values, `what` was interrupted and the `cure`.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": schema, **(said or {}), **identity})
        return
    compare_identity(path, schema, identity, what, cure)
    sweep_all(path.parent)


def compare_identity(path: Path, schema: str, identity: dict[str, Any], what: str, cure: str) -> None:
    """Hold `identity`, or the part of it that is known before the work, against the one at `path`, if one is there.

    Raises `UserError` as `check_identity` does.
    """
    if not path.is_file():
        return
    before = read_json(path)
    if not isinstance(before, dict) or before.get("schema") != schema:
        raise UserError(f"{path} is not {what} of this version; {cure}")
    differing = difference({name: before.get(name) for name in identity}, identity)
    if differing is not None:
        name, stored, ours = differing
        if outdated(stored, ours):
            raise UserError(f"{path.parent} holds {what} of an earlier version, {OUTDATED}; {cure}")
        raise UserError(f"{path.parent} holds {what} with {name} {_short(stored)}, now {_short(ours)}; {cure}")


def difference(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Name (`config.seed` for a nested one) and both values of the first entry that differs; None if all are equal."""
    for name in [*now, *(n for n in before if n not in now)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            differing = difference(old, new)
            if differing is not None:
                return f"{name}.{differing[0]}", *differing[1:]
        elif name == ANSWERS and old != new:
            if not alike(old, new):
                return name, "those of then", "others, so its code or what that reads has changed"
        elif old != new:
            return name, old, new
    return None


def alike(recorded: Any, given: Any) -> bool:
    """Whether a model's outputs, `given` as a list of numbers an image, are those `recorded`; one that lacks says nothing."""
    if not recorded or not given:
        return True
    try:
        if [len(row) for row in recorded] != [len(row) for row in given]:
            return False
        then, now = ([float(value) for row in rows for value in row] for rows in (recorded, given))
    except (TypeError, ValueError):  # the record is a damaged file's
        return False
    bound = ALIKE * math.sqrt(sum(value * value for value in then) / max(1, len(then)))
    return all(abs(a - b) <= bound for a, b in zip(then, now, strict=True))


def fingerprint(data: ImageSet, report: Reporter = silent, of: str = "images") -> str:
    """Hash of a data set's labels, classes and content (`ImageSet.content`); not of its name, since folders are moved. Versions
    before `CONTENT` took two sets whose files had the same names and sizes for one. `of` names the data set in the progress."""
    digest = hashlib.sha256(f"{data.classes} {data.labels}".encode(errors="surrogateescape"))
    digest.update(data.content(lambda _, done, total: report(f"hash of the {of}", done, total)))
    return CONTENT + digest.hexdigest()[:16]


def fingerprints(train: ImageSet, held_out: ImageSet, report: Reporter = silent) -> tuple[str, str]:
    """`fingerprint` of the images that a model is made on, and of those that it is judged by."""
    return fingerprint(train, report, "training images"), fingerprint(held_out, report, "held-out images")


def outdated(stored: Any, ours: Any) -> bool:
    """Whether an entry that differs is a fingerprint of an earlier version, which cannot be compared."""
    return isinstance(ours, str) and ours.startswith(CONTENT) and not str(stored).startswith(CONTENT)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
