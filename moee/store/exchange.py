"""Giving a result its name: renames that never lose what another process put there meanwhile."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from moee.errors import UserError

_AT_FDCWD, NOREPLACE, _EXCHANGE = -100, 1, 2  # linux/fcntl.h, linux/fs.h
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}
Accept = Callable[[Path], None]


def free_name(path: Path, folder: bool) -> Path:
    """A name beside `path` that nothing has, for a finished result that its place refuses."""
    mark = uuid.uuid4().hex[:8]
    return path.with_name(f"{path.name}-{mark}" if folder else f"{path.stem}-{mark}{path.suffix}")


def exchange(temporary: Path, path: Path, accept: Accept) -> bool:
    """Exchange two names and let `accept` look at what was taken away; whatever that raises, an interrupt too, puts it back.

    False, with nothing done, where names cannot be exchanged.
    """
    ours = os.lstat(temporary)
    try:
        if not rename_at(temporary, path, _EXCHANGE):
            return False
        accept(temporary)
    except BaseException:
        if not os.path.samestat(os.lstat(temporary), ours):
            put_back(temporary, path, ours)
        raise
    return True


def put_back(taken: Path, path: Path, ours: os.stat_result) -> None:
    """Give what was taken away its name again, which the result, `ours`, may have meanwhile.

    If that fails, it gets a free name and `UserError` tells which: under a temporary one it would be removed.
    """
    with suppress(OSError):
        if not os.path.lexists(path):
            os.rename(taken, path)
            return
        if os.path.samestat(os.lstat(path), ours) and rename_at(taken, path, _EXCHANGE):
            return
    free = free_name(path, taken.is_dir())
    os.rename(taken, free)
    raise UserError(f"{path} was taken by another process; what was there before is now {free}")


def rename_at(source: Path, target: Path, flags: int) -> bool:
    """False where this system lacks the call, or the file system the flag. Raises `UserError` if NOREPLACE finds a target."""
    call = libc_renameat2()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    if code in (errno.EEXIST, errno.ENOTEMPTY) and flags == NOREPLACE:
        raise Appeared(target)
    raise OSError(code, os.strerror(code), str(target))


class Appeared(UserError):
    """Another process made the output first."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} appeared while this ran, and is left as it is")


@functools.cache
def libc_renameat2():
    """The C library's call; None where it has none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return call
