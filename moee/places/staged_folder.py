"""The folder of a job of several stages: one place, and in it an output for each part."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moee.errors import UserError
from moee.places.output_file import OutputFile
from moee.places.output_folder import OutputFolder
from moee.places.paths import kind_of_entry
from moee.places.placement import Output
from moee.store.artifact import write_json
from moee.store.result_kinds import (
    COMPRESSION,
    DEPLOYMENT,
    ENGINE,
    EXAMPLES,
    EXPORT,
    FINETUNE_STATE,
    LATENCY,
    MODEL,
    PLAN,
    PLAN_STATE,
    REPORT,
    SUMMARY,
    VERIFY,
    FolderKind,
    family,
    is_litter,
    read_object,
)

OLDER = {"demo.json": "moee.demo", "summary.json": "moee.summary"}  # by which the folders of earlier demos are known


@dataclass(frozen=True)
class StagedFolder(Output):
    """The folder of `moee compress` and `moee demo`, in which each part is an output of its own and everything else is left
    alone. An unfinished one is gone on from without `force`; with it, every part is made anew."""

    kind: FolderKind = COMPRESSION

    folders: ClassVar = {
        "plan": PLAN, "extracted": MODEL, "tuned": MODEL, "dense": MODEL, "export": EXPORT, "verify": VERIFY,
        "engine": ENGINE, "bundle": DEPLOYMENT, "plan.resume": PLAN_STATE, "tuned.resume": FINETUNE_STATE,
    }  # fmt: skip
    files: ClassVar = {
        "latency.json": LATENCY, "one/latency.json": LATENCY, "examples.json": EXAMPLES, "summary.json": SUMMARY,
        "report.html": REPORT,
    }  # fmt: skip

    @property
    def _wanted(self) -> str:
        return "a folder"

    def check(self) -> None:
        super().check()
        for name in self.folders:
            self.folder(name).check()
        for name in self.files:
            self.file(name).check()

    def folder(self, name: str) -> OutputFolder:
        """One of `folders`; those in `.resume` are states that an interrupted run left."""
        return OutputFolder(self.place / name, self.folders[name], True, self.inputs, option=self.option)

    def file(self, name: str) -> OutputFile:
        """One of `files`."""
        return OutputFile(self.place / name, self.files[name], True, self.inputs, option=self.option, part=True)

    @property
    def manifest(self) -> Path:
        return self.place / self.kind.manifest

    def write(self, body: dict[str, object]) -> None:
        """The manifest, which says how far the job is; it appears whole."""
        self.place.mkdir(parents=True, exist_ok=True)
        write_json(self.manifest, {"schema": f"{self.kind.schema}/1", **body})

    def clear(self) -> None:
        """Remove every part; what else lies there stays. Raises `UserError` as `check`, with nothing removed."""
        self.check()
        self.manifest.unlink(missing_ok=True)
        for name in self.folders:
            self.folder(name).remove()
        for name in self.files:
            self.file(name).remove()

    def _refuse_existing(self, place: Path) -> None:
        if not place.is_dir():
            raise UserError(f"{self.said} is {kind_of_entry(place)}; name a folder")
        self._refuse_input(place)
        entries = [name for name in os.listdir(place) if not is_litter(name)]
        ours = read_object(self.manifest)
        surrounding = self._surrounding_input(place, artifact=family(ours) == self.kind.schema)
        if surrounding is not None:
            raise UserError(f"{self.said} lies in the input {surrounding}; choose another place, an input is never changed")
        if family(ours) == self.kind.schema and not self.force:
            if ours and ours.get("done"):
                raise UserError(
                    f"output folder {self.path} exists, and what it holds is finished: report.html shows it; choose another "
                    f"{self.option}, or pass --force to make it anew"
                )
            return
        signs = {self.kind.manifest: self.kind.schema, **OLDER}
        if entries and not any(family(read_object(place / name)) == schema for name, schema in signs.items()):
            raise UserError(f"{self.said} holds {min(entries)} and no result of moee compress; choose another place")
        if entries and not self.force:
            raise UserError(f"output folder {self.path} exists; choose another {self.option} or pass --force to replace it")
