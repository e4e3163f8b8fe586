"""What lies under a path: whether two are one place, what kind of thing it is, whether it can be moved."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")


def same_place(path: Path, other: Path) -> bool:
    """Whether two names are of one file or folder, whatever links, `..` or letters of either case lie between."""
    try:
        return os.path.samestat(os.stat(path), os.stat(other))
    except OSError:
        return False


def kind_of_entry(path: Path) -> str:
    """What `path` is, a link not followed, with its article."""
    mode = os.lstat(path).st_mode
    names = {
        stat.S_ISDIR: "a folder", stat.S_ISREG: "a file", stat.S_ISLNK: "a link", stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device",
    }  # fmt: skip
    return next((name for test, name in names.items() if test(mode)), "no ordinary file")


def can_be_moved(folder: Path) -> bool:
    """Whether a folder can be given another name: no mount point, and nobody else's in a folder where only owners may rename."""
    if os.path.ismount(folder) or str(folder) in _mount_points():
        return False
    above = folder.parent.stat()
    return not above.st_mode & stat.S_ISVTX or os.geteuid() in (0, above.st_uid, folder.stat().st_uid)


def _mount_points() -> set[str]:
    """Where something is mounted, bind mounts included; empty on systems that do not tell."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines}
