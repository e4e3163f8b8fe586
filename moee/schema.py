"""Versions of the JSON files. A schema is a name and a number, `moee.model/1`; the number rises when an old reader would
misread a new file. Fields that are merely added leave it.

An older file is brought up step by step by `MIGRATIONS`; a newer one is refused, since nobody can know what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moee.errors import UserError

Migration = Callable[[dict[str, Any]], dict[str, Any]]

# (name, version) to the step that makes version + 1 of it. Every schema is at version 1, so there is none yet.
MIGRATIONS: Mapping[tuple[str, int], Migration] = {}


def split(schema: Any) -> tuple[str, int] | None:
    """`moee.model/1` to ("moee.model", 1); None for anything else."""
    name, slash, number = str(schema).partition("/")
    return (name, int(number)) if isinstance(schema, str) and slash and name and number.isdecimal() and number.isascii() else None


def upgraded(
    body: Any, expected: str, path: Path, migrations: Mapping[tuple[str, int], Migration] = MIGRATIONS
) -> dict[str, Any]:
    """`body` in the version `expected`, migrated if it is older; its own object is not changed.

    Raises `UserError`, one sentence, for a foreign schema, a newer version, or an older one without a migration.
    """
    came = body.get("schema") if isinstance(body, dict) else type(body).__name__
    wanted, given = split(expected), split(came)
    assert wanted is not None, f"{expected!r} is no schema"
    says = f"{path} has schema {came!r}, expected {expected!r}"
    if not isinstance(body, dict) or given is None or given[0] != wanted[0]:
        raise UserError(f"{says}; make it again with this version")
    if given[1] > wanted[1]:
        raise UserError(f"{says}: a newer version wrote it; upgrade moee to read it")
    result = dict(body)
    for version in range(given[1], wanted[1]):
        step = migrations.get((wanted[0], version))
        if step is None:
            raise UserError(f"{says}, and version {version} cannot be converted; make it again with this version")
        result = {**step(result), "schema": f"{wanted[0]}/{version + 1}"}
    return result
