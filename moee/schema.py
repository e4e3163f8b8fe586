"""What the JSON files must look like, and their versions.

A schema is a name and a number, `moee.model/2`; the number rises when an old reader would misread a new file. Fields that are
merely added leave it. An older file is brought up step by step by `MIGRATIONS`; a newer one is refused, since nobody can know
what it means. The fields are described as `Body` models beside the code that reads them; `checked` holds a file against one.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from moee.errors import UserError, plain, printable
from moee.migrations import MIGRATIONS, Migration

MAX_JSON_BYTES = 32 << 20  # the manifests of the largest timm ViTs are below 1 MiB
MAX_JSON_DEPTH = 64
MAX_SHOWN = 200  # characters of a value in a message
Model = TypeVar("Model", bound=BaseModel)


def split(schema: Any) -> tuple[str, int] | None:
    """`moee.model/1` to ("moee.model", 1); None for anything else."""
    name, slash, number = schema.partition("/") if isinstance(schema, str) else ("", "", "")
    plain = number.isdecimal() and number.isascii() and len(number) < 10
    return (name, int(number)) if slash and name and plain else None


def upgraded(
    body: Any, expected: str, path: Path, migrations: Mapping[tuple[str, int], Migration] = MIGRATIONS
) -> dict[str, Any]:
    """`body` in the version `expected`, migrated if it is older; its own object is not changed.

    Raises `UserError`, one sentence, for a foreign schema, a newer version, or an older one without a migration.
    """
    came = body.get("schema") if isinstance(body, dict) else type(body).__name__
    wanted, given = split(expected), split(came)
    assert wanted is not None, f"{expected!r} is no schema"
    says = f"{path} has schema {shown(came)}, expected {expected!r}"
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


def _printable(text: str) -> str:
    if not printable(text):
        raise ValueError("expected text without control characters")
    return text


Text = Annotated[str, Field(max_length=1000), AfterValidator(_printable)]  # a name or a sentence, fit to be shown


class Body(BaseModel):
    """Base of what a manifest must hold: types as JSON has them, finite numbers. Further fields are let through, since fields may
    be added within a version."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def checked(kind: type[Model], body: Any, path: Path | str) -> Model:
    """`body`, read from `path`, as a `kind`. Raises `UserError` that names the first field that is missing or wrong."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        reason = first["msg"].removeprefix("Value error, ")
        came = "" if first["type"] == "missing" or not first["loc"] else f" (came {shown(first['input'])})"
        raise UserError(f"{path}: {shown(where, quoted=False)}: {reason}{came}; make it again") from error


def shown(value: Any, quoted: bool = True, limit: int = MAX_SHOWN) -> str:
    """A value from a file as a message may show it: short, on one line, without control characters."""
    try:
        text = repr(value) if quoted else plain(str(value))
    except ValueError:
        text = "a number of thousands of digits"  # which Python does not write
    return text if len(text) <= limit else f"{text[:limit]}..."


def parse_json(path: Path) -> Any:
    """The JSON in a file. Raises `ValueError` for a file that is none, that no command would write for its size, that says a
    key twice, or whose values nest so deep that code which walks them would run out of stack; `OSError` if it cannot be read."""
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, a device has no end
        raise ValueError("it is no ordinary file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"it is larger than {MAX_JSON_BYTES >> 20} MiB, which no manifest is")
    try:
        body = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error
    level = [body]
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for item in level if isinstance(item, (dict, list))
                 for inner in (item.values() if isinstance(item, dict) else item)]  # fmt: skip
    if level:
        raise ValueError(f"it nests deeper than {MAX_JSON_DEPTH} levels")
    return body


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Readers do not agree on which of two values of a key counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it says {shown(next(name for name in names if names.count(name) > 1), limit=40)} twice")
    return found


def json_safe(value: Any) -> Any:
    """`value` with None for floats that JSON has no word for: an infinite error is one that could not be computed."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    return [json_safe(v) for v in value] if isinstance(value, (list, tuple)) else value


def json_text(value: Any) -> str:
    """`value` as the text of a JSON file, which any reader of JSON takes."""
    return json.dumps(json_safe(value), indent=2, allow_nan=False) + "\n"


def reason_of(error: BaseException, limit: int | None = None) -> str:
    """What an exception of someone else's code says, on one line; its kind where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return shown(text, quoted=False) if limit is None else shown(text, quoted=False, limit=limit)


def data_title(data: str) -> str:
    """A source of images for a title: of a folder the name alone. Where it lay on a machine is in the manifest, and nobody else's
    business."""
    kind, _, rest = data.partition("/")
    if kind in ("wds", "hfds") and os.path.isabs(rest):
        return f"{kind}/{os.path.basename(rest)}"
    return os.path.basename(data) if os.path.isabs(data) else data.partition("@")[0] if kind == "torch" else data
