"""How far a job is: `compress.json`, written after every stage, from which the same command goes on."""

from __future__ import annotations

from typing import Any

from moee.errors import UserError
from moee.places.resume import difference
from moee.places.staged_folder import StagedFolder
from moee.schema import shown
from moee.store.artifact import read_json
from moee.store.result_kinds import family


class State:
    """`identity`: what a run must have in common with the one that it goes on from. `stages`: the facts of each that is done,
    with its seconds."""

    def __init__(self, place: StagedFolder, identity: dict[str, Any]):
        """Go on from what lies in `place`, or begin. Raises `UserError` where that is of other options or images."""
        self.place, self.identity = place, identity
        self.stages: dict[str, dict[str, Any]] = {}
        if place.force and place.place.is_dir():
            place.clear()
        if place.manifest.is_file():
            self._read()
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
        """Whether a stage is done, and its folder, where it has one, still there."""
        return stage in self.stages and (stage not in self.place.folders or (self.place.place / stage).is_dir())

    def add(self, stage: str, facts: dict[str, Any]) -> None:
        self.stages[stage] = facts
        self._write()

    def drop(self, *stages: str) -> None:
        """Forget stages, which must be done anew."""
        for stage in stages:
            self.stages.pop(stage, None)

    def finish(self, result: dict[str, Any]) -> None:
        self._write(done=True, result=result)

    def _write(self, done: bool = False, **facts: Any) -> None:
        self.place.write({"done": done, "identity": self.identity, "stages": self.stages, **facts})
