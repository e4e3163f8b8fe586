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
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moee.errors import UserError
from moee.places.paths import same_place
from moee.store.atomic import probe
from moee.store.leftovers import recover
from moee.store.result_kinds import kind_of


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

    def holds(self, other: Output) -> bool:
        """Whether `other` lies in this one, which appears or is replaced as a whole."""
        return False

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
            if same_place(place, given):
                raise UserError(f"{self.said} is the input {given}; choose another place, an input is never replaced")
            if any(same_place(place, parent) for parent in Path(os.path.realpath(given)).parents):
                raise UserError(f"{self.said} holds the input {given}; choose another place, an input is never replaced")

    def _surrounding_input(self, place: Path, artifact: bool = False) -> Path | None:
        """The input folder that `place` lies in; with `artifact` only one that holds an artifact of ours."""
        for given in self.inputs:
            if os.path.isdir(given) and any(same_place(parent, given) for parent in place.parents if parent.exists()):
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


def check_all(outputs: Sequence[Output]) -> None:
    """Check every place that a command writes to, and that they do not lie in one another. Raises `UserError`."""
    for output in outputs:
        output.check()
    for output in outputs:
        for other in outputs:
            if output is not other and (other.holds(output) or output.place == other.place):
                raise UserError(f"{output.said} lies in {other.said}; choose another place")
