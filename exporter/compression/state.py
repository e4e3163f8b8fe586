"""How far a job is: `compress.json`, written after every stage, from which the same command goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from moee.config import MOST_EPOCHS
from moee.errors import BudgetUnmet, UserError
from moee.places.resume import difference
from moee.places.staged_folder import StagedFolder
from moee.schema import Body, Text, checked, shown, upgraded
from moee.store.artifact import read_json, sha256_file

SCHEMA = "moee.compress/1"
TIMINGS = ("one/latency.json", "latency.json")  # at one image, and at the batch
ORDER = (  # in turn
    "plan", "fallback", "extracted", "tuning", "tuned", "unshipped", "export", "latency", "verify", "bundle", "confirm",
    "examples",
)  # fmt: skip
STAGE_FILES = {"latency": TIMINGS, "examples": ("examples.json",)}
MADE = "made"  # by each part of a stage, SHA-256 of its manifest, or of a part that is a file


class Facts(Body):
    """What a state says of a stage that is done."""

    made: dict[str, str] = {}


class Planned(Facts):
    """What a job that goes on after the plan must know of it; None where no trial export was made."""

    trial_export_seconds: float | None = Field(None, ge=0, allow_inf_nan=False)


class Tuning(Facts):
    """How long the tuning is to be."""

    epochs: int = Field(ge=1, le=MOST_EPOCHS)


class Tuned(Facts):
    """What came of the tuning."""

    epochs: int = Field(ge=0, le=MOST_EPOCHS)
    kept: bool
    why: str


class Unshipped(Facts):
    """Why no cut model ships."""

    why: Text


class Stored(Body):
    """What `compress.json` must hold to be gone on from."""

    identity: dict[str, Any]
    stages: dict[str, Facts]


OWN: dict[str, type[Facts]] = {"plan": Planned, "tuning": Tuning, "tuned": Tuned, "unshipped": Unshipped}  # stages that say more


class State:
    """`identity`: what a run must have in common with the one that it goes on from. `stages`: the facts of each that is done,
    with its seconds."""

    def __init__(self, place: StagedFolder, identity: dict[str, Any]):
        """Read what lies in `place`; nothing is changed. Raises `UserError` where that is of other options or images."""
        self.place, self.identity = place, identity
        self.stages: dict[str, dict[str, Any]] = {}
        if place.manifest.is_file() and not place.force:
            self._read()

    def open(self) -> None:
        """Take the place: `force` removes what an earlier job left there."""
        if self.place.force and self.place.place.is_dir():
            self.place.clear()
        self._write()

    def _read(self) -> None:
        path = self.place.manifest
        cure = "choose another --out or pass --force to begin anew"
        try:
            body = upgraded(read_json(path), SCHEMA, path)
            checked(Stored, body, path)
            for name, kind in OWN.items():
                if name in body["stages"]:
                    checked(kind, body["stages"][name], f"{path}, {name}")
        except UserError as error:
            raise UserError(f"{error}; {cure}") from error
        differing = difference(body["identity"], self.identity)
        if differing is not None:
            name, old, new = differing[0], *(shown(value, limit=80) for value in differing[1:])
            raise UserError(
                f"{self.place.path} holds a compression with {name} {old}, now {new}; give the same options, {cure}"
            )
        self.stages = body["stages"]
        for stage in self.stages:
            self._refuse_changed(stage)

    def _refuse_changed(self, stage: str) -> None:
        """What a stage wrote must not be another model's or a file of the user's by now: later stages are made of it."""
        for part, digest in self.stages[stage].get(MADE, {}).items():
            file = self._file(part)
            if file.exists() and sha256_file(file) != digest:
                raise UserError(
                    f"{file} is not what this compression made; put that back, or remove {self.place.place / part}, and the "
                    "stage is made anew"
                )

    def _file(self, part: str) -> Path:
        """The manifest of a part that is a folder; a part that is a file."""
        kind = self.place.folders.get(part)
        return self.place.place / part if kind is None else self.place.place / part / kind.manifest

    @staticmethod
    def _parts(stage: str) -> tuple[str, ...]:
        return STAGE_FILES.get(stage, (stage,) if stage in StagedFolder.folders else ())

    def done(self, stage: str) -> bool:
        """Whether a stage is done, and what it wrote still there."""
        return stage in self.stages and all(self._file(part).exists() for part in self._parts(stage))

    def begin(self, stage: str) -> None:
        """Forget a stage and those after it, which are made of it."""
        for later in ORDER[ORDER.index(stage):]:
            self.stages.pop(later, None)
        self._write()

    def add(self, stage: str, facts: dict[str, Any]) -> None:
        """Record a finished stage, with the hashes of what it made."""
        made = {part: sha256_file(file) for part in self._parts(stage) if (file := self._file(part)).is_file()}
        self.stages[stage] = {**facts, **({MADE: made} if made else {})}
        self._write()

    def finish(self, result: dict[str, Any]) -> None:
        """Record that all is done."""
        self._write(done=True, result=result)

    def _write(self, done: bool = False, **facts: Any) -> None:
        self.place.write({"done": done, "identity": self.identity, "stages": self.stages, **facts})


@dataclass(frozen=True, repr=False)
class Compressed:
    """`shipped`: plan's way of the model in the bundle, "dense" for that one; `part`: "extracted" or "tuned", the folder of that
    model, or "dense". `lines`: accuracy, speed, size, what was chosen and why, where the bundle is. `folder`: of all stages'
    artifacts."""

    folder: Path
    shipped: str
    part: str
    lines: tuple[str, ...]
    seconds: float
    stages: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The five lines, as a notebook shows them."""
        return "\n".join(self.lines)


def reported(folder: Path, part: str) -> tuple[list[Path], str]:
    """What a report of a compression is made from, and why it has no examples, if so. Where the dense model is shipped, the
    figures of the model that was cut beside it are not the ones of the bundle."""
    if part == "dense":
        why = "Examples show what a cut model answers; here the dense one ships."
        return [folder / part for part in ("plan", "export", "verify")], why
    made = (folder / "examples.json").is_file()
    return [folder], "" if made else f"There was no time for examples. moee plots {folder / part} --out plots makes them."


@contextmanager
def resumable(path: Any) -> Iterator[None]:
    """What fails in the block is told that the job can be gone on with; not a budget that nothing met: it would end alike."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, (SystemExit, BudgetUnmet)):
            error.add_note(f"started again, it goes on from what is in {path}")
        raise
