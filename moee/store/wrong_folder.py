"""A folder of another kind than a command needs: what it holds, and which command leads from the one to the other."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from moee.errors import printable
from moee.store.result_kinds import (
    COMPRESSION,
    ENGINE,
    EXPORT,
    FINETUNE_STATE,
    MODEL,
    PLAN,
    PLAN_STATE,
    FolderKind,
    kind_of,
    read_object,
)

NEXT = {  # what is made from what, and the command that makes it
    PLAN: (MODEL, "moee extract MODEL --data DATA --plan {} --out extracted"),
    MODEL: (EXPORT, "moee export {} --out export"),
    EXPORT: (ENGINE, "moee build {} --out engine"),
}
WANTED = {PLAN: "moee plan", MODEL: "moee extract or finetune", EXPORT: "moee export", ENGINE: "moee build"}  # and who made it
STAGES = {PLAN: ("plan",), MODEL: ("tuned", "extracted"), EXPORT: ("export",), ENGINE: ("engine",)}  # folders in a compression
UNFINISHED = {FINETUNE_STATE: "moee finetune", PLAN_STATE: "moee plan"}


def what_is_in(path: Path | str) -> str:
    """What of ours a folder holds, as a sentence; empty for any other folder and for none."""
    held = kind_of(Path(path)) if os.path.isdir(path) else None
    return f"{path} holds {held.what}" if held is not None else ""


def another_kind(folder: Path, manifest: str) -> str:
    """A sentence about a folder that holds something else of ours than what has this `manifest`, with what to run or to give;
    empty for any other folder."""
    held, wanted = kind_of(folder), next((kind for kind in WANTED if kind.manifest == manifest), None)
    if held is None or wanted is None or held == wanted:
        return ""
    return f"{what_is_in(folder)}, and {wanted.what} is needed: {_cure(folder, held, wanted)}"


def _cure(folder: Path, held: FolderKind, wanted: FolderKind) -> str:
    if held in UNFINISHED:
        return f"run the same {UNFINISHED[held]} again, which goes on with it"
    if held == COMPRESSION and wanted in STAGES:
        stages = STAGES[wanted]
        return f"give {folder / next((name for name in stages if (folder / name).is_dir()), stages[-1])}"
    steps: list[str] = []
    at, place = held, shlex.quote(str(folder))
    while at in NEXT and at != wanted:
        at, command = NEXT[at]
        steps.append(command.format(place))
        place = command.rpartition(" ")[2]
    if at == wanted:
        return "run " + ", then ".join(f"`{step}`" for step in steps) + " first"
    source = (read_object(folder / held.manifest) or {}).get("source") if (held, wanted) == (EXPORT, MODEL) else None
    if isinstance(source, str) and printable(source):
        made_from = Path(os.path.normpath(folder / source))
        if kind_of(made_from) == wanted:
            return f"give {made_from}, which it was exported from"
    return f"give a folder that {WANTED[wanted]} wrote"
