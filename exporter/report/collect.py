"""Finds the artifacts that a report is about and reads them; what is missing is part of the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter.report.choice import choose
from exporter.report.sources import KINDS, NAMES, Artifact, Sources
from moee.errors import UserError
from moee.schema import shown, upgraded
from moee.store.artifact import read_json, sha256_file, stays_inside
from moee.store.wrong_folder import what_is_in

PLOTS = "*.svg"
MAX_JSON_BYTES = 32 << 20  # the manifests of the largest timm ViTs are below 1 MiB


def collect(paths: Sequence[Path | str], verify: bool = True) -> Sources:
    """Read the artifacts in `paths`: folders (and the folders in them) or single JSON files.

    What is shown of each kind says `choose`. `verify` compares the files that a manifest lists with their hashes. Raises
    `UserError` for a path that does not exist or holds nothing for a report; a damaged file becomes one of `problems`.
    """
    sources = Sources()
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} not found; give folders or JSON files that moee commands wrote")
        _collect_one(path, sources, verify)
    if not sources.all:
        looked = ", ".join(map(str, paths))
        reason = f" ({sources.problems[0]})" if sources.problems else ""
        raise UserError(f"no results in {looked}{reason}; expected one of {', '.join(NAMES)} there or one folder below")
    choose(sources)
    return sources


def _collect_one(path: Path, sources: Sources, verify: bool) -> None:
    """Read what one path of the command line holds. Raises `UserError` if that is nothing for a report."""
    read, known = len(sources.all), {artifact.path.resolve() for artifact in sources.all}
    problems, plots = len(sources.problems), list[Path]()
    files = _candidates(path)
    for file in files:
        if file.resolve() not in known:
            _read(file, sources, verify)
    if path.is_dir():
        plots = [p for p in sorted([*path.glob(PLOTS), *path.glob(f"*/{PLOTS}")]) if p.is_file()]
        sources.plots += [p for p in plots if p not in sources.plots]
    if path.is_file() and len(sources.all) == read and len(sources.problems) > problems:
        raise UserError(f"nothing for a report in {path}: {sources.problems[-1]}")
    if not files and not plots:
        held = what_is_in(path)
        came = f"{held}, which a report does not show" if held else f"no results in {path}"
        raise UserError(f"{came}; expected one of {', '.join(NAMES)} there or one folder below; leave it out")


def _candidates(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    folders = [path, *sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))]
    return [folder / name for folder in folders for name in NAMES if (folder / name).is_file()]


def _read(path: Path, sources: Sources, verify: bool) -> None:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB; no manifest is")
        body = read_json(path)
        schema = body.get("schema") if isinstance(body, dict) else None
        kind, _, version = str(schema).partition("/")
        number = version.partition(".")[0]
        if kind not in KINDS or not number.isdecimal() or not number.isascii() or len(number) > 9:
            raise UserError(f"{path} has schema {shown(schema)}; expected one of {', '.join(KINDS)}")
        if int(number) < KINDS[kind][0]:
            number = str(KINDS[kind][0])
            body = upgraded(body, f"{kind}/{number}", path)
    except UserError as error:
        sources.problems.append(str(error))
        return
    if int(number) > KINDS[kind][0]:
        newer = shown(schema, quoted=False)
        sources.problems.append(f"{path} has schema {newer}, newer than this report reads; its figures are left out")
    sources.all.append(Artifact(kind, int(number), path, body, _check_hashes(path, body) if verify else "not checked"))


def _check_hashes(path: Path, body: dict[str, Any]) -> str:
    files = body.get("files")
    if not isinstance(files, dict):
        return "lists no files"
    for name, expected in files.items():
        file = path.parent / str(name)
        if not stays_inside(path.parent, str(name)):
            return f"{name} leaves the folder"
        if not file.is_file():
            return f"{name} is missing"
        if sha256_file(file) != expected:
            return f"{name} was changed"
    return "match"
