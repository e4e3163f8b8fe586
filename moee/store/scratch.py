"""Scratch folders that go away at the end, those of killed processes too."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moee.store.leftovers import make_locked, sweep_matching

SCRATCH = "moee-tmp-"


def sweep_scratch(base: Path | None = None) -> None:
    """Remove the scratch folders that killed processes left below `base` (default: the system's temporary folder)."""
    sweep_matching(base or Path(tempfile.gettempdir()), re.compile(rf"{SCRATCH}[0-9a-f]{{8}}"))


@contextmanager
def temporary_folder(parent: Path | str | None = None) -> Iterator[Path]:
    """A scratch folder below `parent` (default: the system's) that is removed at the end.

    One that a killed process left is removed by the next call with the same parent.
    """
    base = Path(parent) if parent is not None else Path(tempfile.gettempdir())
    sweep_scratch(base)
    folder, lock = make_locked(lambda: base / f"{SCRATCH}{uuid.uuid4().hex[:8]}", mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
