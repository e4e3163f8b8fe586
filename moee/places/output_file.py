"""Files that a command writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moee.errors import UserError
from moee.places.paths import kind_of_entry
from moee.places.placement import Output
from moee.schema import json_text
from moee.store.atomic import atomic_file
from moee.store.exchange import free_name
from moee.store.result_kinds import FOLDER_KINDS, LATENCY, FileKind, artifact_of, kind_of


@dataclass(frozen=True)
class OutputFile(Output):
    """A file that appears whole. `part`: of a folder that the user named; an earlier one of this kind is replaced, and with
    `force` nothing else is either."""

    kind: FileKind = LATENCY
    part: bool = False

    @property
    def _wanted(self) -> str:
        return "a file"

    @contextmanager
    def write(self, late: bool = False) -> Iterator[Path]:
        """The name of a temporary file that takes the place at the end, as `moee.store.atomic.atomic_file`.

        `late`: if the place refuses, the file is written beside it, and the `UserError` at the end says where.
        """
        refusal = self._late_refusal(late)
        if refusal is None:
            with atomic_file(self.place, self._refuse_existing) as temporary:
                yield temporary
            return
        kept = free_name(self.place, folder=False)
        with atomic_file(kept) as temporary:
            yield temporary
        raise UserError(f"{refusal}; the result is kept as {kept}") from refusal

    def write_json(self, body: Any) -> None:
        """Write JSON, as `moee.store.artifact.write_json`. It is what was measured, so `late` holds."""
        with self.write(late=True) as temporary:
            temporary.write_text(json_text(body), encoding="utf-8")

    def write_text(self, text: str) -> None:
        """Write a text as UTF-8."""
        with self.write() as temporary:
            temporary.write_text(text, encoding="utf-8")

    def remove(self) -> None:
        """Remove what `write` would replace."""
        if os.path.lexists(self.place):
            self._refuse_existing(self.place)
            self.place.unlink()

    def check(self) -> None:
        if os.fspath(self.path).endswith("/"):
            raise UserError(f"{self.said} is a folder's name; name a file")
        super().check()
        place = self.place
        self._refuse_manifest(place)
        surrounding = None if os.path.lexists(place) else self._surrounding_input(place, artifact=True)
        if surrounding is None or (place.suffix in self.kind.endings and not self.kind.sealed):
            return
        endings = " or ".join(self.kind.endings)
        how = "" if self.kind.sealed else f", or let the name end in {endings}"
        raise UserError(f"{self.said} lies in the input {surrounding}; choose another place{how}")

    def _refuse_manifest(self, place: Path) -> None:
        """A file in an artifact must not look like the manifest of another one."""
        other = next((k for k in FOLDER_KINDS if k.manifest == place.name and k.schema != self.kind.schema), None)
        holder = kind_of(place.parent) if other is not None else None
        if other is not None and holder is not None:
            raise UserError(
                f"{self.said}: {place.name} is how the manifest of {other.what} is called, and {place.parent} is {holder.what}; "
                "choose another name"
            )

    def _refuse_existing(self, path: Path) -> None:
        """What is at `path`, which is the place or what was there a moment ago, must not be lost."""
        place = self.place
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{self.said} is {kind_of_entry(path)}; name a file")
        self._refuse_input(path)
        owner = artifact_of(place)
        if owner is not None:
            folder, kind = owner
            raise UserError(f"{self.said} belongs to {kind.what} in {folder}; choose another place, its files go together")
        ours = self.kind.wrote(path)
        if ours and (self.part or not self.kind.kept):
            return
        if self.part:
            raise UserError(f"{self.said} is not {self.kind.what}; move it away, or choose another place")
        if self.kind.sealed:
            raise UserError(f"{self.said} is not {self.kind.what}; choose another, a new file or one that TensorRT wrote")
        if not self.force:
            what = self.kind.what if ours else f"not {self.kind.what}"
            raise UserError(f"{self.said} exists and is {what}; choose another {self.option} or pass --force to replace it")
        surrounding = None if ours else self._surrounding_input(place)
        if surrounding is not None:
            raise UserError(f"{self.said} lies in the input {surrounding}; choose another place, an input is never changed")
