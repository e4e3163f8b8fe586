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

from moee.errors import UserError
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


@contextmanager
def scratch_in(folder: Path | str | None) -> Iterator[None]:
    """A block whose scratch folders lie below `folder` (None: where they lie anyhow), those of its child processes too. Raises
    `UserError` unless something can be written there."""
    if folder is None:
        yield
        return
    path, before, named = os.path.abspath(folder), tempfile.tempdir, os.environ.get("TMPDIR")
    try:
        with temporary_folder(path):
            pass
    except OSError as error:
        raise UserError(f"--scratch {folder}: {error.strerror}; give a folder that can be written") from error
    try:
        tempfile.tempdir = os.environ["TMPDIR"] = path
        yield
    finally:
        tempfile.tempdir = before
        os.environ.pop("TMPDIR")
        if named is not None:
            os.environ["TMPDIR"] = named
