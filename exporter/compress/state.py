"""How far a job is: `compress.json`, written after every stage, from which the same command goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moee.errors import UserError
from moee.places.resume import difference
from moee.places.staged_folder import StagedFolder
from moee.schema import shown
from moee.store.artifact import read_json
from moee.store.result_kinds import family

TIMINGS = ("one/latency.json", "latency.json")  # at one image, and at the batch
ORDER = (  # in turn
    "plan", "fallback", "extracted", "tuning", "tuned", "unshipped", "export", "latency", "verify", "bundle", "examples",
)  # fmt: skip
STAGE_FILES = {"latency": TIMINGS, "examples": ("examples.json",)}


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
        body = read_json(self.place.manifest)
        cure = "give the same options, choose another --out or pass --force to begin anew"
        if family(body) != self.place.kind.schema or not isinstance(body.get("stages"), dict):
            raise UserError(f"{self.place.manifest} is damaged; {cure}")
        before = body.get("identity")
        differing = difference(before if isinstance(before, dict) else {}, self.identity)
        if differing is not None:
            name, old, new = differing
            raise UserError(
                f"{self.place.path} holds a compression with {name} {shown(old, limit=80)}, now {shown(new, limit=80)}; {cure}"
            )
        self.stages = body["stages"]

    def done(self, stage: str) -> bool:
        """Whether a stage is done, and what it wrote still there."""
        parts = STAGE_FILES.get(stage, (stage,) if stage in self.place.folders else ())
        return stage in self.stages and all((self.place.place / part).exists() for part in parts)

    def begin(self, stage: str) -> None:
        """Forget a stage and those after it, which are made of it."""
        for later in ORDER[ORDER.index(stage):]:
            self.stages.pop(later, None)
        self._write()

    def add(self, stage: str, facts: dict[str, Any]) -> None:
        self.stages[stage] = facts
        self._write()

    def finish(self, result: dict[str, Any]) -> None:
        self._write(done=True, result=result)

    def _write(self, done: bool = False, **facts: Any) -> None:
        self.place.write({"done": done, "identity": self.identity, "stages": self.stages, **facts})


@dataclass(frozen=True)
class Compressed:
    """`shipped`: plan's way of the model in the bundle, "dense" for that one. `lines`: accuracy, speed, size, what was chosen and
    why, where the bundle is. `folder`: of all stages' artifacts."""

    folder: Path
    shipped: str
    lines: tuple[str, ...]
    seconds: float
    stages: dict[str, Any] = field(default_factory=dict)


@contextmanager
def resumable(path: Any) -> Iterator[None]:
    """What fails in the block is told that the job can be gone on with."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SystemExit):
            error.add_note(f"the same command goes on from what is in {path}")
        raise
