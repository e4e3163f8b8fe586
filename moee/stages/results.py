"""What a stage leaves: its model on disk, measured or not, and the memory that it took."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.errors import UserError
from moee.measure.probe import Probe
from moee.parallel.group import Group
from moee.places.resume import fingerprint
from moee.schema import reason_of
from moee.space.machine import peak_memory_bytes
from moee.stages.session import Session

log = logging.getLogger("moee")


def measured(session: Session, model: nn.Module, probe: Probe | None, message: str) -> dict[str, Any]:
    """`Session.measure` with a hash of the held-out images, `held_out`, by which figures on others are told apart; empty on ranks
    other than 0."""
    found = session.measure(model, probe, message)
    return {**found, "held_out": fingerprint(session.held_out, session.report, "held-out images")} if found else found


@contextmanager
def kept(
    moee: MoeeModel, stage: str, out: Path | str | None, force: bool, group: Group, *, inputs: tuple[Path, ...]
) -> Iterator[None]:
    """A block that measures the finished model of a stage: if it fails or is interrupted, rank 0 writes the model without. Where
    nothing is to be written, a failure other than an interrupt is logged, and the model has no measurements."""
    try:
        yield
    except BaseException as error:
        moee.info["stages"][stage]["unmeasured"] = type(error).__name__
        if out is None:
            if not isinstance(error, Exception):
                raise
            log.warning("the %s model could not be measured: %s", stage, reason_of(error))
            return
        if group.leader:
            try:
                checkpoint.save(moee, out, force, inputs)
                error.add_note(f"the {stage} model is in {out}, without measurements; the same command with --force makes them")
            except (OSError, UserError) as refusal:
                error.add_note(f"the {stage} model could not be written to {out}: {refusal}")
        raise


def save(moee: MoeeModel, out: Path | str | None, force: bool, group: Group, inputs: tuple[Path, ...]) -> None:
    """Rank 0 writes the artifact, with the number of ranks in it; the others wait for it. Nothing is written without `out`."""
    peaks = group.all_json(peak_memory_bytes())
    moee.info["peak_memory_bytes"] = max(peaks)
    if not group.alone:
        moee.info["ranks"] = {"world": group.world, "peak_memory_bytes": peaks}
    with group.agreed():
        if group.leader and out is not None:
            checkpoint.save(moee, out, force, inputs)
