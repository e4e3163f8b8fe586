"""RESULT.json: what measure.sh on a device wrote, held against the candidates that it was given."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from exporter.targets.roofline import roofline_facts, scale_of
from exporter.targets.target import latency
from moee.bounds import CANDIDATES
from moee.errors import UserError
from moee.planning.budget import MOST_MS
from moee.planning.emitted import Sending, Sha256
from moee.planning.shortlist import Timed
from moee.schema import Body, Text, checked, shown, upgraded
from moee.store.artifact import read_json

SCHEMA = "moee.measured/1"
MOST_ROUNDS = 99
Milliseconds = Annotated[float, Field(gt=0, le=MOST_MS)]
Samples = Annotated[list[Milliseconds], Field(min_length=1, max_length=MOST_ROUNDS)]


class Device(Body):
    """What the device calls itself. `model` is its maker's name, `gpu` that of CUDA."""

    model: Text | None
    gpu: Text | None
    machine: Text | None = None
    kernel: Text | None = None
    release: Text | None = None

    @property
    def name(self) -> str:
        return self.model or self.gpu or "an unnamed device"


class Clock(Body):
    clock: Text | None
    mhz: float | None
    max_mhz: float | None = None


class Zone(Body):
    zone: Text | None
    celsius: float


class Environment(Body):
    """How the device stood, before and after."""

    power_mode: Text | None
    clocks: list[Clock] = Field(max_length=100)
    temperatures: list[Zone] = Field(max_length=100)


class Model(Body):
    """Medians of each round in milliseconds: of the GPU's work, and of copies and work together."""

    id: Sha256
    gpu_ms: Samples
    host_ms: Samples


class Candidate(Body):
    """A candidate's medians, or why it has none."""

    id: Sha256
    gpu_ms: Samples | None = None
    host_ms: Samples | None = None
    failed: Text | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Candidate:
        timed = self.gpu_ms is not None and self.host_ms is not None
        if timed == bool(self.failed) or (self.gpu_ms is None) != (self.host_ms is None):
            raise ValueError("expected gpu_ms and host_ms, or why the candidate failed")
        return self


class Measured(Body):
    """The body of RESULT.json."""

    emit: Sha256
    device: Device
    tensorrt: Text | None
    batch: int
    precision: Text
    rounds: int = Field(ge=1, le=MOST_ROUNDS)
    environment: list[Environment] = Field(min_length=2, max_length=2)
    dense: Model
    candidates: list[Candidate] = Field(min_length=1, max_length=CANDIDATES.most)

    @model_validator(mode="after")
    def _complete(self) -> Measured:
        models: list[Model | Candidate] = [self.dense, *self.candidates]
        for model in models:
            for samples in (model.gpu_ms, model.host_ms):
                if samples is not None and len(samples) != self.rounds:
                    raise ValueError(f"expected a time of each of the {self.rounds} rounds, came {len(samples)}")
        if len({candidate.id for candidate in self.candidates}) < len(self.candidates):
            raise ValueError("expected each candidate once")
        return self


def read_result(path: Path | str) -> Measured:
    """Raises `UserError` for a file that is no result of measure.sh, or a damaged one."""
    path = Path(path)
    return checked(Measured, upgraded(read_json(path), SCHEMA, path), path)


def timed(result: Measured, sending: Sending, path: Path | str, board: str | None = None) -> Timed:
    """What a result says of the candidates that were sent. `board`: the roofline that it is compared with, else the one of the
    device's name. Raises `UserError` unless it is of just these candidates."""
    _refuse_others(result, sending, path)
    said = {candidate.id: candidate for candidate in result.candidates}
    latencies = [_latency(said[sent.id], result) for sent in sending.candidates]
    name, dense_ms = result.device.name, statistics.median(result.dense.gpu_ms)
    roofline = roofline_facts(board, name, [sent.modelled for sent in sending.candidates], latencies, dense_ms)
    dense = latency(f"measured on {name}", name, result.batch, dense_ms, dense_ms)
    entries = [said[sent.id].model_dump(exclude_none=True) for sent in sending.candidates]
    facts = {**result.model_dump(exclude={"schema"}), "name": name, "candidates": entries, "roofline": roofline}
    return Timed(dense, latencies, facts, scale_of(roofline))


def _latency(candidate: Candidate, result: Measured) -> dict[str, Any] | str:
    """A candidate's latency. Its speedup is the median of the rounds' ratios, and `speedup_range` the least and the largest."""
    if candidate.gpu_ms is None:
        return candidate.failed or ""
    name, dense = result.device.name, result.dense.gpu_ms
    ratios = [d / m for d, m in zip(dense, candidate.gpu_ms, strict=True)]
    figures = latency(
        f"measured on {name}", name, result.batch, statistics.median(dense), statistics.median(candidate.gpu_ms),
        speedup_range=[min(ratios), max(ratios)],
    )  # fmt: skip
    return {**figures, "speedup": statistics.median(ratios)}


def _refuse_others(result: Measured, sending: Sending, path: Path | str) -> None:
    cure = "run measure.sh in the folder that --emit wrote last, or write and measure them again"
    ids, sent = {candidate.id for candidate in result.candidates}, {candidate.id for candidate in sending.candidates}
    if result.emit != sending.emit or ids - sent:
        raise UserError(f"{path} is of other candidates: it says {result.emit[:12]}, this plan {sending.emit[:12]}; {cure}")
    if sent - ids:
        raise UserError(f"{path} lacks {len(sent - ids)} of the {len(sent)} candidates; {cure}")
    for what in ("batch", "precision", "dense"):
        ours, theirs = getattr(sending, what), result.dense.id if what == "dense" else getattr(result, what)
        if ours != theirs:
            raise UserError(f"{path} was measured with {what} {shown(theirs)}, expected {shown(ours)}; {cure}")
