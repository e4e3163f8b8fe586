"""Files and folders that appear whole or not at all.

What is being written lies beside its destination as `.NAME.xxxxxxxx.tmp`, is synced to disk and then renamed, so a reader sees
the former content or the new one and never a part. Its maker holds a lock (flock) on that folder, which ends with the process:
whoever writes NAME next removes what a killed process left, and never what another one is still writing.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moee.errors import UserError
from moee.store.exchange import NOREPLACE, Accept, Appeared, exchange, free_name, put_back, rename_at
from moee.store.leftovers import locked, make_locked, recover, remove_any, sweep, temporary_name


def whatever(path: Path) -> None:
    """Accepts the loss of anything: for places that are this program's own."""


@contextmanager
def atomic_folder(path: Path | str, force: bool = False, accept: Accept = whatever) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, and vanishes if it raises.

    With `force`, what is at `path` is replaced if `accept` lets it: that is called with `path`, and again with the path of what
    was taken away, before it is deleted. If it raises anything, that is put back. Raises `UserError` if `path` exists and `force`
    is off, also when it appears while the block runs, or if its parent cannot be written. A finished folder that its place
    refuses is not lost: it stays beside `path`, and the message says where.
    """
    path = Path(path)
    recover(path)
    if os.path.lexists(path) and not force:
        raise UserError(f"output folder {path} exists; choose another --out or pass --force to replace it")
    with _workspace(path) as temporary:
        yield temporary
        for item in sorted(temporary.rglob("*")):
            _sync(item)
        _sync(temporary)
        with _kept(temporary, path):
            _publish(temporary, path, accept if force else None)
        _sync(path.parent)


@contextmanager
def atomic_file(path: Path | str, accept: Accept | None = None) -> Iterator[Path]:
    """Yield the name of a temporary file that replaces `path` when the block ends, and vanishes if it raises.

    Whatever the writer puts beside that file goes away with it. `accept` as for `atomic_folder` (None: any file is replaced).
    Raises `UserError` if the parent cannot be written.
    """
    path = Path(path)
    with _workspace(path) as folder:
        temporary = folder / path.name
        yield temporary
        _sync(temporary)
        if accept is None:
            os.replace(temporary, path)
        else:
            with _kept(temporary, path):
                _publish_file(temporary, path, accept)
        _sync(path.parent)


def probe(path: Path) -> None:
    """Make a folder where `path` will be built, and remove it. Raises `UserError` if that cannot be done.

    Permission bits do not tell: root passes them, and read-only file systems, /proc and names that are too long have none.
    Folders that are missing above `path` are tried too, inside the first one, and are not left behind.
    """
    missing = [path]
    while not os.path.lexists(missing[-1].parent):
        missing.append(missing[-1].parent)
    first, *rest = reversed(missing)
    try:
        if rest:  # what a killed probe left there; what lies beside `path` goes when that is written
            sweep(first)
        temporary, lock = make_locked(lambda: temporary_name(first))
        try:
            if rest:
                (temporary / Path(*(part.name for part in rest[:-1])) / temporary_name(path).name).mkdir(parents=True)
        finally:
            remove_any(temporary)
            os.close(lock)
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}; choose another output folder") from error


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill in between leaves all of it or none under its name."""
    if not path.is_dir():
        return
    gone = temporary_name(path)
    os.rename(path, gone)
    remove_any(gone)
    sweep(path)


@contextmanager
def _workspace(path: Path) -> Iterator[Path]:
    """A locked temporary folder beside `path`; what is left of it at the end is removed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        temporary, lock = make_locked(lambda: temporary_name(path))
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}; choose another output folder") from error
    try:
        yield temporary
    finally:
        remove_any(temporary)
        os.close(lock)


def _publish(temporary: Path, path: Path, accept: Accept | None) -> None:
    """Give `temporary` the name `path`; with `accept`, what is there takes the temporary name in the same instant.

    Where the file system cannot exchange names, two renames do it; `recover` mends a kill in between.
    """
    if accept is None:
        if not rename_at(temporary, path, NOREPLACE):
            if os.path.lexists(path):
                raise Appeared(path)
            os.rename(temporary, path)
        return
    if not os.path.lexists(path):
        os.rename(temporary, path)
        return
    accept(path)
    with locked(path):
        if exchange(temporary, path, accept):
            return
        ours, former = os.lstat(temporary), path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
        try:
            os.rename(path, former)
            accept(former)
            os.rename(temporary, path)
        except BaseException:
            if os.path.lexists(former) and os.path.lexists(temporary):
                put_back(former, path, ours)
            raise
        remove_any(former)


def _publish_file(temporary: Path, path: Path, accept: Accept) -> None:
    """Give the file `temporary` the name `path`; a file that is there, or has appeared, is looked at by `accept` first."""
    try:
        if not os.path.lexists(path):
            if not rename_at(temporary, path, NOREPLACE):
                os.rename(temporary, path)
            return
    except Appeared:
        pass
    accept(path)
    if not exchange(temporary, path, accept):
        os.replace(temporary, path)


@contextmanager
def _kept(temporary: Path, path: Path) -> Iterator[None]:
    """Save a finished result under a free name if its place refuses it: it may have taken hours."""
    try:
        yield
    except (UserError, OSError) as error:
        free = free_name(path, temporary.is_dir())
        try:
            os.rename(temporary, free)
        except OSError:
            raise error from None
        reason = str(error) if isinstance(error, UserError) else f"{path} cannot be written: {error.strerror or error}"
        raise UserError(f"{reason}; the result is kept as {free}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
