"""Where results go: one place decides, for every command, what may be written where, and what may be replaced.

Two rules. A result never costs a file that is not an earlier result of the same command: a folder is replaced only if it is empty
or holds an artifact of ours of the same kind and no other file, and without `--force` only the report of a refusal; a file is
overwritten only if the same command wrote it, or with `--force`, and never if it is an input, lies in one, or belongs to an
artifact. What can refuse a place does so before the work: `check` tries out whether something can be written there. `write` looks
again when the result is put in its place. After long work it is called with `late`: a place that refuses by then does not cost
the result, which is written beside it.
"""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from moee.errors import UserError
from moee.schema import json_text
from moee.store.artifact import sha256_file, stays_inside
from moee.store.atomic import atomic_file, atomic_folder, free_name, probe, recover, remove_folder
from moee.store.result_kinds import (
    BUILT_IN_DATA,
    DEMO,
    ENGINE,
    EXPORT,
    FINETUNE_STATE,
    FOLDER_KINDS,
    LATENCY,
    MODEL,
    PARITY,
    REPORT,
    SUMMARY,
    FileKind,
    FolderKind,
    artifact_of,
    family,
    files_below,
    is_litter,
    is_signed,
    kind_of,
    made_from,
    matches,
    read_object,
)

MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Output(ABC):
    """A place that a command writes to, as its user named it with `option`, and what the command reads: `inputs`.

    `path` is a file's or a folder's; relative ones are of the folder that the process works in. Raises `UserError`, exit code 2,
    with nothing touched, from `check` and `write`.
    """

    path: Path | str
    kind: Any
    force: bool = False
    inputs: tuple[Path, ...] = ()
    option: str = "--out"

    @property
    def place(self) -> Path:
        """The path with links and `..` above its last part resolved."""
        path = Path(self.path)
        return Path(os.path.realpath(path.parent)) / path.name

    @property
    def said(self) -> str:
        return f"{self.option} {self.path}"

    def check(self) -> None:
        """Refuse a place that must not be written, or cannot be. Call it before any long work.

        What a killed replacement had moved aside is put back first.
        """
        try:
            self._refuse_names()
            recover(self.place)
            if os.path.lexists(self.place):
                self._refuse_existing(self.place)
            self._refuse_above(self.place)
        except OSError as error:
            raise UserError(f"{self.said} cannot be looked at: {error.strerror}; choose another place") from error
        probe(self.place)

    def _refuse_names(self) -> None:
        text = os.fspath(self.path)
        if text == "~" or text.startswith("~/"):
            raise UserError(
                f"{self.option} {text}: ~ is the home folder only where a shell sees it; leave the quotes out, or write ./~ for "
                "a folder of that name"
            )
        if Path(text).name in ("", ".."):
            raise UserError(f"{self.option} {text!r} is no name of something new; name {self._wanted} to be made")
        place = self.place
        if place.is_symlink():
            target = os.readlink(place)
            raise UserError(f"{self.said} is a link to {target}; name the place itself, a link is never replaced")

    def _refuse_above(self, place: Path) -> None:
        for parent in place.parents:
            if os.path.lexists(parent):
                if not parent.is_dir():
                    raise UserError(f"{self.said}: {parent} is no folder; choose another place")
                return

    def _refuse_input(self, place: Path) -> None:
        """What is at `place` must not be an input or hold one."""
        for given in self.inputs:
            if not os.path.exists(given):
                continue
            if _same(place, given):
                raise UserError(f"{self.said} is the input {given}; choose another place, an input is never replaced")
            if any(_same(place, parent) for parent in Path(os.path.realpath(given)).parents):
                raise UserError(f"{self.said} holds the input {given}; choose another place, an input is never replaced")

    def _surrounding_input(self, place: Path, artifact: bool = False) -> Path | None:
        """The input folder that `place` lies in; with `artifact` only one that holds an artifact of ours."""
        for given in self.inputs:
            if os.path.isdir(given) and any(_same(parent, given) for parent in place.parents if parent.exists()):
                if not artifact or kind_of(given) is not None:
                    return given
        return None

    def _late_refusal(self, late: bool) -> UserError | None:
        """What `check` says; without `late` that is raised."""
        try:
            self.check()
        except UserError as refusal:
            if not late:
                raise
            return refusal
        return None

    @property
    @abstractmethod
    def _wanted(self) -> str:
        """What to name, for a message."""

    @abstractmethod
    def _refuse_existing(self, place: Path) -> None:
        """Raise `UserError` if what is at `place` must not be lost."""


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
            raise UserError(f"{self.said} is {_described(place)}; name a folder that does not exist yet")
        if not self.force and not self.grows:
            self._refuse_result(place)
        self._refuse_input(place)
        ours = self._manifest(place, sorted(os.listdir(place))) is not None
        if ours and self.grows and not self.force:
            return
        surrounding = self._surrounding_input(place, artifact=ours)  # an earlier result below a data folder is no part of it
        if surrounding is not None:
            raise UserError(f"{self.said} lies in the input {surrounding}; choose another place, an input is never changed")
        if _same(place, Path.cwd()) or any(_same(place, parent) for parent in Path.cwd().parents):
            raise UserError(f"{self.said} is or holds the folder that this command runs in; choose another place")
        if self.grows and not self.force:  # it is empty, and stays where it is
            return
        self._refuse_loss(place)
        self._refuse_changed(place)
        if not _movable(place):
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
            raise UserError(f"{self.said} is {_described(place)}; name a folder")
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


@dataclass(frozen=True)
class OutputFile(Output):
    """A file that appears whole."""

    kind: FileKind = LATENCY

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
            raise UserError(f"{self.said} is {_described(path)}; name a file")
        self._refuse_input(path)
        owner = artifact_of(place)
        if owner is not None:
            folder, kind = owner
            raise UserError(f"{self.said} belongs to {kind.what} in {folder}; choose another place, its files go together")
        ours = self.kind.wrote(path)
        if ours and not self.kind.kept:
            return
        if self.kind.sealed:
            raise UserError(f"{self.said} is not {self.kind.what}; choose another, a new file or one that TensorRT wrote")
        if not self.force:
            what = self.kind.what if ours else f"not {self.kind.what}"
            raise UserError(f"{self.said} exists and is {what}; choose another {self.option} or pass --force to replace it")
        surrounding = None if ours else self._surrounding_input(place)
        if surrounding is not None:
            raise UserError(f"{self.said} lies in the input {surrounding}; choose another place, an input is never changed")


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
            raise UserError(f"{self.said} is {_described(place)}; name a folder")
        if not self.force:
            raise UserError(f"output folder {self.path} exists; choose another {self.option} or pass --force to replace it")
        entries = [name for name in os.listdir(place) if not is_litter(name)]
        signs = (read_object(place / name) for name in (self.kind.manifest, "summary.json"))  # the latter of older demos alone
        if entries and not any(family(sign) in (self.kind.schema, SUMMARY.schema) for sign in signs):
            raise UserError(f"{self.said} holds {min(entries)} and no demo; choose another place")


def resume_folder(out: Path | str, kind: FolderKind, inputs: tuple[Path, ...] = ()) -> OutputFolder:
    """Where an interrupted run leaves its state: `<out>.resume`. It is removed when the run is done."""
    path = Path(out)
    return OutputFolder(path.parent / f"{path.name}.resume", kind, True, inputs, option="the state of --out in", grows=True)


def check_all(outputs: Sequence[Output]) -> None:
    """Check every place that a command writes to, and that they do not lie in one another."""
    for output in outputs:
        output.check()
    for output in outputs:
        for other in outputs:
            inside = isinstance(other, OutputFolder) and not other.grows and other.place in output.place.parents
            if output is not other and (inside or output.place == other.place):
                raise UserError(f"{output.said} lies in {other.said}; choose another place")


def source_paths(*sources: str | Path | None) -> tuple[Path, ...]:
    """What data sources, weights and artifacts name on disk, and what those artifacts say that they were made from.

    A source such as `wds/FOLDER` names a folder behind its kind. The name of built-in data names a file or an artifact too, if
    one lies under it; any other folder of that name is read by no command, and no result ever replaces it.
    """
    found: dict[str, Path] = {}  # by real path, so that artifacts that name each other come to an end
    waiting = [os.fspath(source) for source in sources if source]
    while waiting:
        text = waiting.pop(0)
        path = next((Path(name) for name in (text, text.partition("/")[2]) if name and os.path.lexists(name)), None)
        if path is None or os.path.realpath(path) in found:
            continue
        if text.partition(":")[0] in BUILT_IN_DATA and path.is_dir() and kind_of(path) is None:
            continue
        found[os.path.realpath(path)] = path
        waiting += made_from(path)
    return tuple(found.values())


def _beside_images(place: Path, data: Path) -> bool:
    """Whether a folder below `data` that `place` lies in holds images: a new folder there may be one more class. A folder of
    results beside the splits is none."""
    from moee.data.split_folders import holds_images  # brings torchvision, which a command that writes no folder does without

    above = [parent for parent in place.parents if parent.is_dir()]
    root = next(number for number, parent in enumerate(above) if _same(parent, data))
    return any(holds_images(parent) for parent in above[:root])


def _same(path: Path, other: Path) -> bool:
    """Whether two names are of one file or folder, whatever links, `..` or letters of either case lie between."""
    try:
        return os.path.samestat(os.stat(path), os.stat(other))
    except OSError:
        return False


def _described(path: Path) -> str:
    mode = os.lstat(path).st_mode
    names = {
        stat.S_ISDIR: "a folder", stat.S_ISREG: "a file", stat.S_ISLNK: "a link", stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device",
    }  # fmt: skip
    return next((name for test, name in names.items() if test(mode)), "no ordinary file")


def _movable(folder: Path) -> bool:
    """Whether a folder can be given another name: no mount point, and nobody else's in a folder where only owners may rename."""
    if os.path.ismount(folder) or str(folder) in _mount_points():
        return False
    above = folder.parent.stat()
    return not above.st_mode & stat.S_ISVTX or os.geteuid() in (0, above.st_uid, folder.stat().st_uid)


def _mount_points() -> set[str]:
    """Where something is mounted, bind mounts included; empty on systems that do not tell."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines}
