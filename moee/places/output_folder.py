"""Folders that a command writes: the work appears whole, or grows in place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moee.errors import UserError
from moee.places.paths import can_be_moved, kind_of_entry, same_place
from moee.places.placement import Output
from moee.store.artifact import sha256_file, stays_inside
from moee.store.atomic import atomic_folder, remove_folder
from moee.store.exchange import free_name
from moee.store.result_kinds import MODEL, FolderKind, family, files_below, is_litter, is_signed, kind_of, matches, read_object


@dataclass(frozen=True)
class OutputFolder(Output):
    """A folder that appears whole. `grows`: it is filled step by step instead, and what it holds is gone on from without
    `force`; `force` then removes it first."""

    kind: FolderKind = MODEL
    grows: bool = False

    @property
    def _wanted(self) -> str:
        return "a folder"

    def check(self) -> None:
        super().check()
        place = self.place
        surrounding = None if os.path.lexists(place) else self._surrounding_input(place)
        if surrounding is not None and (kind_of(surrounding) is not None or _beside_images(place, surrounding)):
            raise UserError(f"{self.said} lies in the input {surrounding}; choose another place, an input is never changed")

    def holds(self, other: Output) -> bool:
        return not self.grows and self.place in other.place.parents

    @contextmanager
    def write(self, late: bool = False) -> Iterator[Path]:
        """A temporary folder that takes the place at the end, as `moee.store.atomic.atomic_folder`.

        `late`: if the place refuses, the folder is written beside it, and the `UserError` at the end says where.
        """
        refusal = self._late_refusal(late)
        if refusal is None:
            replaces = self.force or self._is_refusal(self.place)
            with atomic_folder(self.place, replaces, self._refuse_loss if self.force else self._refuse_result) as folder:
                yield folder
            return
        kept = free_name(self.place, folder=True)
        with atomic_folder(kept) as folder:
            yield folder
        raise UserError(f"{refusal}; the result is kept as {kept}") from refusal

    def remove(self) -> None:
        """Remove the folder with all that it holds, which is nothing but ours."""
        if self.place.is_dir() and not self.place.is_symlink():
            self._refuse_input(self.place)
            self._refuse_loss(self.place)
            remove_folder(self.place)

    def _refuse_existing(self, place: Path) -> None:
        if not place.is_dir():
            raise UserError(f"{self.said} is {kind_of_entry(place)}; name a folder that does not exist yet")
        if not self.force and not self.grows:
            self._refuse_result(place)
        self._refuse_input(place)
        ours = self._manifest(place, sorted(os.listdir(place))) is not None
        if ours and self.grows and not self.force:
            return
        surrounding = self._surrounding_input(place, artifact=ours)  # an earlier result below a data folder is no part of it
        if surrounding is not None:
            raise UserError(f"{self.said} lies in the input {surrounding}; choose another place, an input is never changed")
        if same_place(place, Path.cwd()) or any(same_place(place, parent) for parent in Path.cwd().parents):
            raise UserError(f"{self.said} is or holds the folder that this command runs in; choose another place")
        if self.grows and not self.force:  # it is empty, and stays where it is
            return
        self._refuse_loss(place)
        self._refuse_changed(place)
        if not can_be_moved(place):
            raise UserError(f"{self.said} is a mount point or someone else's, so it cannot be replaced; choose another place")

    def _refuse_result(self, place: Path) -> None:
        """Without `force` nothing is replaced but the report of a refusal."""
        if not self._is_refusal(place):
            raise UserError(f"output folder {self.path} exists; choose another {self.option} or pass --force to replace it")

    def _is_refusal(self, place: Path) -> bool:
        """Whether a folder holds the report of a refused command of this kind, and nothing else."""
        if place.is_symlink() or not place.is_dir():
            return False
        entries = [name for name in os.listdir(place) if not is_litter(name)]
        return bool(entries) and all(is_signed(place / name, self.kind.refusals) for name in entries)

    def _refuse_loss(self, place: Path) -> None:
        """Only an empty folder may be lost, or an artifact of this kind with nothing beside it."""
        if place.is_symlink() or not place.is_dir():
            raise UserError(f"{self.said} is {kind_of_entry(place)}; name a folder")
        entries = sorted(os.listdir(place))
        body = self._manifest(place, entries)
        if body is None:
            return
        files = body.get("files")
        listed = {self.kind.manifest, *(files if isinstance(files, dict) else ())}
        for name in files_below(place):
            if name not in listed and not matches(name, self.kind.beside):
                raise UserError(
                    f"{self.said} is {self.kind.what} and also holds {name}, which moee did not put there; move that away or "
                    "choose another place"
                )

    def _refuse_changed(self, place: Path) -> None:
        """Files under names of ours must be those that were written: another one is somebody's own."""
        body = read_object(place / self.kind.manifest) or {}
        files = body.get("files")
        for name, digest in files.items() if isinstance(files, dict) else ():
            if stays_inside(place, name) and (place / name).is_file() and sha256_file(place / name) != digest:
                raise UserError(
                    f"{self.said} is {self.kind.what}, and its {name} is not the file that moee wrote; move it away, or choose "
                    "another place"
                )

    def _manifest(self, place: Path, entries: list[str]) -> dict[str, Any] | None:
        """The manifest of an artifact of this kind; None where nothing can be lost. Raises `UserError` for anything else."""
        entries = [name for name in entries if not is_litter(name)]
        if not entries:
            return None
        body = read_object(place / self.kind.manifest)
        if body is not None and family(body) == self.kind.schema:
            return body
        kind = kind_of(place)
        if kind is not None:
            raise UserError(f"{self.said} holds {kind.what} ({kind.manifest}), not {self.kind.what}; choose another place")
        if self.kind.signs and all(is_signed(place / name, self.kind.signs) for name in entries):
            return None
        broken = self.kind.manifest in entries
        found = f"{self.kind.manifest}, which cannot be read as that of" if broken else f"{entries[0]} and not"
        raise UserError(
            f"{self.said} holds {found} {self.kind.what}; only that or an empty folder is replaced, so choose another place or "
            "remove it yourself"
        )


def resume_folder(out: Path | str, kind: FolderKind, inputs: tuple[Path, ...] = ()) -> OutputFolder:
    """Where an interrupted run leaves its state: `<out>.resume`. It is removed when the run is done."""
    path = Path(out)
    return OutputFolder(path.parent / f"{path.name}.resume", kind, True, inputs, option="the state of --out in", grows=True)


def _beside_images(place: Path, data: Path) -> bool:
    """Whether a folder below `data` that `place` lies in holds images: a new folder there may be one more class. A folder of
    results beside the splits is none."""
    from moee.data.folders.splits import holds_images  # brings torchvision, which a command that writes no folder does without

    above = [parent for parent in place.parents if parent.is_dir()]
    root = next(number for number, parent in enumerate(above) if same_place(parent, data))
    return any(holds_images(parent) for parent in above[:root])
