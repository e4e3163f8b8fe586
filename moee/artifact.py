"""Artifacts: folders with a manifest and hashes, written atomically. Never a pickle.

A folder is built beside its destination, synced to disk and renamed into place, so a reader sees the old artifact,
the new one or none, and never a part.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moee.errors import UserError
from moee.schema import parse_json, shown, upgraded

MAX_NAME_BYTES = 255  # of one part of a path, on every common file system


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as hex digits, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(path: Path, force: bool) -> None:
    """Raise `UserError` if `path` exists and `force` is off. Call it before any long work starts."""
    if os.path.lexists(path) and not force:
        raise UserError(f"output folder {path} exists; choose another --out or pass --force to replace it")


@contextmanager
def atomic_folder(path: Path | str, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, and vanishes if it raises.

    Raises `UserError` if `path` exists and `force` is off, or if its parent cannot be written.
    """
    path = Path(path)
    refuse_existing(path, force)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}; choose another output folder") from error
    try:
        yield temporary
        for item in sorted(temporary.rglob("*")):
            _sync(item)
        _sync(temporary)
        replaced = None
        if os.path.lexists(path):
            replaced = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
            os.rename(path, replaced)
        os.rename(temporary, path)
        _sync(path.parent)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: Path | str, data: Any) -> None:
    """Write JSON atomically: temporary file, fsync, rename."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path | str) -> Any:
    """Parse a JSON file. Raises `UserError` if it is missing or malformed."""
    path = Path(path)
    try:
        return parse_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} not found; expected a file that a moee command wrote") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); make it again") from error


def tool_versions() -> dict[str, str]:
    """Versions that decide an artifact's content."""
    import timm
    import torch

    from moee import __version__

    return {"moee": __version__, "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}


def write_manifest(folder: Path, name: str, schema: str, body: dict[str, Any]) -> None:
    """Write `folder/name`: `schema`, tool versions, SHA-256 of every other file in the folder, then `body`."""
    files = {
        str(item.relative_to(folder)): sha256_file(item)
        for item in sorted(folder.rglob("*"))
        if item.is_file() and item.name != name
    }
    write_json(folder / name, {"schema": schema, "tools": tool_versions(), "files": files, **body})


def stays_inside(folder: Path, relative: str) -> bool:
    """Whether a name from a manifest means a file below `folder`, through no link."""
    if not relative or not relative.isprintable() or Path(relative).is_absolute() or ".." in Path(relative).parts:
        return False
    try:
        if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in Path(relative).parts):
            return False
        resolved = (folder / relative).resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that no file system can hold
        return False
    return resolved == folder.resolve() / Path(relative)


def read_manifest(folder: Path | str, name: str, schema: str, verify: bool = True) -> dict[str, Any]:
    """Read `folder/name`, check its schema and, with `verify`, the hash of each file that it lists.

    Raises `UserError` for a missing folder, a foreign or newer schema, a missing or changed file, or a name that leaves the
    folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected one that holds {name}")
    manifest = upgraded(read_json(folder / name), schema, folder / name)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise UserError(f"{folder / name} lists no files; make it again")
    for relative, expected in files.items() if verify else ():
        path = folder / relative
        if not stays_inside(folder, relative):
            raise UserError(f"{folder / name} names {shown(relative)}, which leaves its folder; do not use this artifact")
        if not path.is_file():
            raise UserError(f"{path} is missing; its manifest lists it; make the artifact again")
        if sha256_file(path) != expected:
            raise UserError(f"{path} does not match the hash in {name}: it was changed or cut short; make it again")
    return manifest
