"""The memory and the disk that this process may still take. What a system does not tell is None, never taken for enough or too
little."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

STATUS, MEMINFO, OWN_GROUP = Path("/proc/self/status"), Path("/proc/meminfo"), Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


class Available(NamedTuple):
    """Bytes, and what sets the limit."""

    size_bytes: int
    limit: str


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> Available | None:
    """What this process may still take: the least of what the machine has, its control groups leave and its limits allow; None
    where nothing tells."""
    found = [each for each in (_machine(), _groups(), *_limits()) if each is not None]
    return min(found, default=None)


def free_disk(folder: Path | str) -> int | None:
    """Bytes that can be written below `folder`, which may be one that is to be made; None where it does not tell."""
    for place in (Path(folder), *Path(os.path.abspath(folder)).parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def give_back() -> None:
    """Return to the system what was freed. The C library keeps it for later, and the stages' peaks would add up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc's alone
    if trim is not None:
        trim(0)


def _field(path: Path, name: str) -> int | None:
    """A field of a table such as /proc/meminfo, in bytes."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _machine() -> Available | None:
    free = _field(MEMINFO, "MemAvailable")
    return None if free is None else Available(free, "free on this machine")


def _groups() -> Available | None:
    """What the control group of this process, and those around it, leave (version 2, then 1)."""
    try:
        own = {fields[1]: fields[2] for line in OWN_GROUP.read_text().splitlines() if len(fields := line.split(":", 2)) == 3}
    except OSError:
        own = {"": "/"}
    names = ("memory.max", "memory.current", "inactive_file")
    left = [_left(folder, *names) for folder in _upwards(GROUPS, own.get("", "/"))]
    if (old := GROUPS / "memory").is_dir():
        path = next((where for kinds, where in own.items() if "memory" in kinds.split(",")), "/")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        left += [_left(folder, *names) for folder in _upwards(old, path)]
    least = min((each for each in left if each is not None), default=None)
    return None if least is None else Available(max(0, least), "left by the control group's limit")


def _upwards(root: Path, path: str) -> list[Path]:
    """The folder of a control group and those above it, as far as `root`."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [root.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _left(folder: Path, limit: str, current: str, inactive: str) -> int | None:
    """A group's limit less what it holds that cannot be dropped; None without a limit."""
    try:
        most, held = int((folder / limit).read_text()), int((folder / current).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # none here, or "max"
        return None
    return most - held + int(stat.get(inactive, 0))


def _limits() -> list[Available]:
    """What the limits on the address space and on private memory leave."""
    found = []
    for kind, field, flag in ((resource.RLIMIT_AS, "VmSize", "-v"), (resource.RLIMIT_DATA, "VmData", "-d")):
        most = resource.getrlimit(kind)[0]
        if most != resource.RLIM_INFINITY:
            taken = _field(STATUS, field) or peak_memory_bytes()
            found.append(Available(max(0, most - taken), f"left by the limit on the process (ulimit {flag})"))
    return found
