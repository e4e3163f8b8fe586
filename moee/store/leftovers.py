"""Temporary folders beside a destination, the locks on them, and what killed writers left there."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_UNFOLLOWED = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # to lock whatever is there: no link's target, and no pipe waited for


def sweep(path: Path) -> None:
    """Remove what killed writers of `path` left beside it: their work, and the former content once there is a new one."""
    kinds = "tmp|old" if os.path.lexists(path) else "tmp"
    sweep_matching(path.parent, re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.({kinds})"))


def sweep_all(folder: Path) -> None:
    """Remove what killed writers of any file left in `folder`, which must be this program's own: its cache, a store of results.

    A writer killed after its file was in place leaves an empty folder, and nobody writes a finished file again.
    """
    sweep_matching(folder, re.compile(r"\..+\.[0-9a-f]{8}\.tmp"))


def recover(path: Path) -> None:
    """Put the former content back if a replacement was killed between its two renames (see `moee.store.atomic`)."""
    if os.path.lexists(path) or not path.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.old")
    for name in sorted(os.listdir(path.parent)):
        if pattern.fullmatch(name):
            with locked(path.parent / name) as alone:
                if not alone:  # its writer lives, and is between the two
                    continue
                with suppress(FileNotFoundError):  # that writer, or another reader, was faster
                    if not os.path.lexists(path):
                        os.rename(path.parent / name, path)
                    return


def make_locked(name, mode: int = 0o777) -> tuple[Path, int]:
    """Make a folder and lock it; again under another name if a sweep took the folder before it was locked."""
    while True:
        folder = name()
        os.mkdir(folder, mode)
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: nobody sweeps there
            return folder, lock
        if _same(folder, lock):
            return folder, lock
        os.close(lock)


def sweep_matching(parent: Path, pattern: re.Pattern[str]) -> None:
    """Remove this user's folders right below `parent` whose names match `pattern` and whose makers no longer hold their locks."""
    try:
        with os.scandir(parent) as entries:
            candidates = [Path(e.path) for e in entries if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for folder in candidates:
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(folder, lock) and os.fstat(lock).st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its maker lives, or this file system has no locks
            continue
        finally:
            os.close(lock)


def _same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Lock what is at `path`, whatever name it has meanwhile, so that no `sweep` or `recover` takes it; False if another has it.

    What cannot be locked, such as a link, counts as free.
    """
    try:
        lock = os.open(path, _UNFOLLOWED)
    except OSError:
        yield True
        return
    try:
        free = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            free = not isinstance(error, BlockingIOError)
        yield free
    finally:
        os.close(lock)


def temporary_name(path: Path) -> Path:
    """A name beside `path` for what takes its place later."""
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"


def remove_any(path: Path) -> None:
    """Remove a folder with all that it holds, or a file or link; a missing one is none to remove."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
