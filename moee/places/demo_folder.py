"""The folder of a demo: one place, and in it an output for each part."""

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
from moee.store.result_kinds import (
    DEMO,
    ENGINE,
    EXPORT,
    FINETUNE_STATE,
    LATENCY,
    MODEL,
    PARITY,
    REPORT,
    SUMMARY,
    FolderKind,
    family,
    is_litter,
    read_object,
)


@dataclass(frozen=True)
class DemoFolder(Output):
    """The folder of a demo, in which each part is an output of its own and everything else is left alone."""

    kind: FolderKind = DEMO

    @property
    def _wanted(self) -> str:
        return "a folder"

    folders: ClassVar = {
        "extracted": MODEL, "tuned": MODEL, "export": EXPORT, "engine": ENGINE, "tuned.resume": FINETUNE_STATE
    }  # fmt: skip
    files: ClassVar = {"summary.json": SUMMARY, "parity.json": PARITY, "latency.json": LATENCY, "report.html": REPORT}

    def check(self) -> None:
        super().check()
        for name in self.folders:
            self.folder(name).check()
        for name in self.files:
            self.file(name).check()

    def folder(self, name: str) -> OutputFolder:
        """One of `folders`; `tuned.resume` is the state that an interrupted demo left."""
        return OutputFolder(self.place / name, self.folders[name], True, option=self.option)

    def file(self, name: str) -> OutputFile:
        """One of `files`."""
        return OutputFile(self.place / name, self.files[name], True, option=self.option)

    def _refuse_existing(self, place: Path) -> None:
        if not place.is_dir():
            raise UserError(f"{self.said} is {kind_of_entry(place)}; name a folder")
        if not self.force:
            raise UserError(f"output folder {self.path} exists; choose another {self.option} or pass --force to replace it")
        entries = [name for name in os.listdir(place) if not is_litter(name)]
        signs = (read_object(place / name) for name in (self.kind.manifest, "summary.json"))  # the latter of older demos alone
        if entries and not any(family(sign) in (self.kind.schema, SUMMARY.schema) for sign in signs):
            raise UserError(f"{self.said} holds {min(entries)} and no demo; choose another place")
