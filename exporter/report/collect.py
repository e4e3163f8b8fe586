"""Finds the artifacts that a report is about and reads them; what is missing is part of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moee.errors import UserError
from moee.schema import shown
from moee.store.artifact import read_json, sha256_file, stays_inside

NAMES = ("summary.json", "moee.json", "export.json", "engine.json", "parity.json", "latency.json")
# Schema, the highest version whose fields are known here, and the command that makes it.
KINDS = {
    "moee.model": (1, "moee extract"),
    "moee.export": (1, "moee export"),
    "moee.parity": (1, "moee verify --out verify"),
    "moee.latency": (1, "moee bench --out latency.json"),
    "moee.engine": (1, "moee build"),
    "moee.summary": (1, "moee demo"),
}
PLOTS = "*.svg"
MAX_JSON_BYTES = 32 << 20  # the manifests of the largest timm ViTs are below 1 MiB


@dataclass(frozen=True)
class Artifact:
    """One file that was read. `hashes` says whether the files that it lists are as it describes them."""

    kind: str
    version: int
    path: Path
    body: dict[str, Any]
    hashes: str

    @property
    def folder(self) -> Path:
        return self.path.parent


@dataclass
class Sources:
    """Everything that was found. `artifacts` holds the one that is shown of each kind, `all` every one."""

    artifacts: dict[str, Artifact] = field(default_factory=dict)
    all: list[Artifact] = field(default_factory=list)
    plots: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def body(self, kind: str) -> dict[str, Any] | None:
        """The manifest of a kind, or None if there is none or its version is not known here."""
        found = self.artifacts.get(kind)
        return found.body if found and found.version <= KINDS[kind][0] else None

    @property
    def missing(self) -> list[tuple[str, str]]:
        """Kinds that were not found, with the command that makes each; the summary is a demo's alone."""
        return [(kind, command) for kind, (_, command) in KINDS.items() if kind not in self.artifacts and kind != "moee.summary"]


def collect(paths: Sequence[Path | str], verify: bool = True) -> Sources:
    """Read the artifacts in `paths`: folders (and the folders in them) or single JSON files.

    Where two models are found, the one with more stages is shown: a tuned model holds the figures of the extracted one.
    `verify` compares the files that a manifest lists with their hashes. Raises `UserError` for a path that does not exist
    or when nothing is found; a damaged file becomes one of `problems`.
    """
    sources = Sources()
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} not found; give folders or JSON files that moee commands wrote")
        for file in _candidates(path):
            _read(file, sources, verify)
        if path.is_dir():
            sources.plots += [p for p in sorted([*path.glob(PLOTS), *path.glob(f"*/{PLOTS}")]) if p.is_file()]
    if not sources.all:
        looked = ", ".join(map(str, paths))
        reason = f" ({sources.problems[0]})" if sources.problems else ""
        raise UserError(f"no results in {looked}{reason}; expected one of {', '.join(NAMES)} there or one folder below")
    for artifact in sources.all:
        shown = sources.artifacts.get(artifact.kind)
        if shown is None or _stages(artifact) > _stages(shown):
            sources.artifacts[artifact.kind] = artifact
    return sources


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


def _stages(artifact: Artifact) -> int:
    stages = (artifact.body.get("info") or {}).get("stages") if isinstance(artifact.body.get("info"), dict) else None
    return len(stages) if isinstance(stages, dict) else 0
