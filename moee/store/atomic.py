"""Files and folders that appear whole or not at all, and temporary ones that a killed process does not leave for ever.

What is being written lies beside its destination as `.NAME.xxxxxxxx.tmp`, is synced to disk and then renamed, so a reader sees
the former content or the new one and never a part. Its maker holds a lock (flock) on that folder, which ends with the process:
whoever writes NAME next removes what a killed process left, and never what another one is still writing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moee.errors import UserError

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # linux/fcntl.h, linux/fs.h
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}
_UNFOLLOWED = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # to lock whatever is there: no link's target, and no pipe waited for
SCRATCH = "moee-tmp-"

Accept = Callable[[Path], None]


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
        temporary, lock = _make_locked(lambda: _temporary_name(first))
        try:
            if rest:
                (temporary / Path(*(part.name for part in rest[:-1])) / _temporary_name(path).name).mkdir(parents=True)
        finally:
            _remove(temporary)
            os.close(lock)
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}; choose another output folder") from error


def free_name(path: Path, folder: bool) -> Path:
    """A name beside `path` that nothing has, for a finished result that its place refuses."""
    mark = uuid.uuid4().hex[:8]
    return path.with_name(f"{path.name}-{mark}" if folder else f"{path.stem}-{mark}{path.suffix}")


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill in between leaves all of it or none under its name."""
    if not path.is_dir():
        return
    gone = _temporary_name(path)
    os.rename(path, gone)
    _remove(gone)
    sweep(path)


def sweep(path: Path) -> None:
    """Remove what killed writers of `path` left beside it: their work, and the former content once there is a new one."""
    kinds = "tmp|old" if os.path.lexists(path) else "tmp"
    _sweep(path.parent, re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.({kinds})"))


def sweep_all(folder: Path) -> None:
    """Remove what killed writers of any file left in `folder`, which must be this program's own: its cache, a store of results.

    A writer killed after its file was in place leaves an empty folder, and nobody writes a finished file again.
    """
    _sweep(folder, re.compile(r"\..+\.[0-9a-f]{8}\.tmp"))


def recover(path: Path) -> None:
    """Put the former content back if a replacement was killed between its two renames (see `_publish`)."""
    if os.path.lexists(path) or not path.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.old")
    for name in sorted(os.listdir(path.parent)):
        if pattern.fullmatch(name):
            with _locked(path.parent / name) as alone:
                if not alone:  # its writer lives, and is between the two
                    continue
                with suppress(FileNotFoundError):  # that writer, or another reader, was faster
                    if not os.path.lexists(path):
                        os.rename(path.parent / name, path)
                    return


def sweep_scratch(base: Path | None = None) -> None:
    """Remove the scratch folders that killed processes left below `base` (default: the system's temporary folder)."""
    _sweep(base or Path(tempfile.gettempdir()), re.compile(rf"{SCRATCH}[0-9a-f]{{8}}"))


@contextmanager
def temporary_folder(parent: Path | str | None = None) -> Iterator[Path]:
    """A scratch folder below `parent` (default: the system's) that is removed at the end.

    One that a killed process left is removed by the next call with the same parent.
    """
    base = Path(parent) if parent is not None else Path(tempfile.gettempdir())
    sweep_scratch(base)
    folder, lock = _make_locked(lambda: base / f"{SCRATCH}{uuid.uuid4().hex[:8]}", mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextmanager
def _workspace(path: Path) -> Iterator[Path]:
    """A locked temporary folder beside `path`; what is left of it at the end is removed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        temporary, lock = _make_locked(lambda: _temporary_name(path))
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}; choose another output folder") from error
    try:
        yield temporary
    finally:
        _remove(temporary)
        os.close(lock)


def _make_locked(name, mode: int = 0o777) -> tuple[Path, int]:
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


def _sweep(parent: Path, pattern: re.Pattern[str]) -> None:
    try:
        with os.scandir(parent) as entries:
            found = [Path(e.path) for e in entries if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for folder in found:
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


def _publish(temporary: Path, path: Path, accept: Accept | None) -> None:
    """Give `temporary` the name `path`; with `accept`, what is there takes the temporary name in the same instant.

    Where the file system cannot exchange names, two renames do it; `recover` mends a kill in between.
    """
    if accept is None:
        if not _renameat2(temporary, path, _NOREPLACE):
            if os.path.lexists(path):
                raise _appeared(path)
            os.rename(temporary, path)
        return
    if not os.path.lexists(path):
        os.rename(temporary, path)
        return
    accept(path)
    with _locked(path):
        if _exchange(temporary, path, accept):
            return
        ours, former = os.lstat(temporary), path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
        try:
            os.rename(path, former)
            accept(former)
            os.rename(temporary, path)
        except BaseException:
            if os.path.lexists(former) and os.path.lexists(temporary):
                _put_back(former, path, ours)
            raise
        _remove(former)


def _exchange(temporary: Path, path: Path, accept: Accept) -> bool:
    """Exchange two names and let `accept` look at what was taken away; whatever that raises, an interrupt too, puts it back.

    False, with nothing done, where names cannot be exchanged.
    """
    ours = os.lstat(temporary)
    try:
        if not _renameat2(temporary, path, _EXCHANGE):
            return False
        accept(temporary)
    except BaseException:
        if not os.path.samestat(os.lstat(temporary), ours):
            _put_back(temporary, path, ours)
        raise
    return True


def _put_back(taken: Path, path: Path, ours: os.stat_result) -> None:
    """Give what was taken away its name again, which the result, `ours`, may have meanwhile.

    If that fails, it gets a free name and `UserError` tells which: under a temporary one it would be removed.
    """
    with suppress(OSError):
        if not os.path.lexists(path):
            os.rename(taken, path)
            return
        if os.path.samestat(os.lstat(path), ours) and _renameat2(taken, path, _EXCHANGE):
            return
    free = free_name(path, taken.is_dir())
    os.rename(taken, free)
    raise UserError(f"{path} was taken by another process; what was there before is now {free}")


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
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


def _publish_file(temporary: Path, path: Path, accept: Accept) -> None:
    """Give the file `temporary` the name `path`; a file that is there, or has appeared, is looked at by `accept` first."""
    try:
        if not os.path.lexists(path):
            if not _renameat2(temporary, path, _NOREPLACE):
                os.rename(temporary, path)
            return
    except _Appeared:
        pass
    accept(path)
    if not _exchange(temporary, path, accept):
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


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """False where this system lacks the call, or the file system the flag. Raises `UserError` if NOREPLACE finds a target."""
    call = _libc_renameat2()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    if code in (errno.EEXIST, errno.ENOTEMPTY) and flags == _NOREPLACE:
        raise _appeared(target)
    raise OSError(code, os.strerror(code), str(target))


class _Appeared(UserError):
    """Another process made the output first."""


def _appeared(path: Path) -> _Appeared:
    return _Appeared(f"{path} appeared while this ran, and is left as it is")


@functools.cache
def _libc_renameat2():
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return call


def _temporary_name(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
