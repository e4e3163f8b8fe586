"""Artifacts: folders with a manifest and hashes, written atomically (`moee.store.atomic`). Never a pickle."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

from moee.errors import UserError, printable
from moee.schema import json_text, parse_json, shown, upgraded
from moee.store.atomic import write_text
from moee.store.leftovers import recover
from moee.store.wrong_folder import another_kind

MAX_NAME_BYTES = 255  # of one part of a path, on every common file system


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as hex digits, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path | str, data: Any) -> None:
    """Write JSON atomically; numbers that it has no word for become null."""
    write_text(path, json_text(data))


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

    from moee.version import VERSION

    return {"moee": VERSION, "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}


def write_manifest(folder: Path, name: str, schema: str, body: dict[str, Any]) -> None:
    """Write `folder/name`: `schema`, tool versions, SHA-256 of every other file in the folder, then `body`."""
    files = {
        str(item.relative_to(folder)): sha256_file(item)
        for item in sorted(folder.rglob("*"))
        if item.is_file() and item != folder / name
    }
    write_json(folder / name, {"schema": schema, "tools": tool_versions(), "files": files, **body})


def stays_inside(folder: Path, relative: str) -> bool:
    """Whether a name from a manifest means a file below `folder`, through no link."""
    if not relative or not printable(relative) or Path(relative).is_absolute() or ".." in Path(relative).parts:
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
        recover(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected one that holds {name}")
    held = another_kind(folder, name) if not os.path.lexists(folder / name) else ""
    if held:
        raise UserError(held)
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
