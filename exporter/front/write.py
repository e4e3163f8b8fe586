"""A front as files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from exporter.front.picture import panels, sheet
from exporter.front.points import read_front
from moee.errors import UserError
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder
from moee.store.artifact import read_manifest, write_manifest
from moee.store.atomic import write_text
from moee.store.result_kinds import FRONT, PLAN


def write_front(plan: Path | str, out: Path | str, *, force: bool = False) -> list[str]:
    """Draw the front of the plan in the folder `plan` into the folder `out`, as `front.svg` and, with its numbers, `front.json`;
    returns the file names.

    Raises `UserError` for a damaged plan, one without a figure to draw, or if `out` exists and `force` is off.
    """
    from moee.planning.found import SCHEMA  # it needs torch, and a page that shows a front does not

    output = OutputFolder(out, FRONT, force, source_paths(plan))
    output.check()
    front = read_front(read_manifest(plan, PLAN.manifest, SCHEMA))
    if not panels(front):
        raise UserError(f"{plan} holds no candidate with a quality and a cost to draw; plan again")
    with output.write() as folder:
        chosen = front.chosen.name if front.chosen else "nothing"
        write_text(folder / "front.svg", sheet(front, f"{front.model} on {front.data}; chosen: {chosen}") + "\n")
        write_manifest(folder, FRONT.manifest, f"{FRONT.schema}/1", asdict(front))
        return sorted(path.name for path in folder.iterdir())
