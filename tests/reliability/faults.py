"""The shared plan of `csrc/faults.c` as Python sees it, and the compilation of that library."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path

OFF, COUNT, KILL, FAIL_ONCE, FAIL_FROM, MOVE = range(6)
LAYOUT = struct.Struct("=iiiiqq4096s4096s")  # struct plan
SOURCE = Path(__file__).parent / "csrc" / "faults.c"


def compile_library(folder: Path) -> Path:
    """The preloadable library; `None` cannot be: callers skip where `cc` is missing."""
    library = folder / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True, capture_output=True)
    return library


def compiler() -> str | None:
    return shutil.which("cc")


class Plan:
    """The mapped plan. All processes that were started with FAULTS set to `path` follow it."""

    def __init__(self, path: Path):
        self.path = path
        path.write_bytes(bytes(LAYOUT.size))
        with open(path, "r+b") as file:
            self.map = mmap.mmap(file.fileno(), LAYOUT.size)

    def arm(
        self, mode: int, root: Path, at: int = 0, error: int = 0, no_renameat2: bool = False, victim: Path | None = None
    ) -> None:
        """Follow `mode` from the next change on, counted from 1, below `root`. `victim`: what `MOVE` takes away."""
        name = os.fsencode(root.resolve())
        self.map[:] = LAYOUT.pack(mode, error, int(no_renameat2), 0, 0, at, name, os.fsencode(victim or ""))

    def disarm(self) -> int:
        """Stop counting; the number of changes so far."""
        count = LAYOUT.unpack(self.map[:])[4]
        self.map[:] = bytes(LAYOUT.size)
        return count
