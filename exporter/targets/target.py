"""A target: where models will run, and how a plan's candidates are timed there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from moee.planning.forms import Latency
from moee.planning.shortlist import Shortlist
from moee.progress import Reporter
from moee.stages.session import Session


@dataclass(frozen=True)
class Target(ABC):
    """`name` is the word that a user types. Candidates are timed in batches of `batch` images, exported in `precision`; `most` of
    them, where they are timed together."""

    name: str
    batch: int
    precision: str
    most: int

    @property
    def label(self) -> str:
        """Where and how, in words."""
        typed = "" if self.precision == "fp32" else f", {self.precision}"
        return f"{self.name}, batch {self.batch}{typed}"

    @abstractmethod
    def check(self) -> None:
        """Refuse before long work: raise `MissingDependency` for what this machine or the device lacks, `UserError` for what was
        asked and cannot be."""

    @abstractmethod
    def timing(self, session: Session, report: Reporter) -> Latency | Shortlist:
        """How the models of `session` are timed: each point of a plan as it is made, or some of them together at the end."""


def latency(kind: str, device: str, batch: int, dense_ms: float, moee_ms: float, **others: Any) -> dict[str, Any]:
    """What a plan records of one candidate; milliseconds a batch. `kind` says measured or modelled."""
    figures = {"dense_ms": dense_ms, "moee_ms": moee_ms, "speedup": dense_ms / moee_ms}
    return {"kind": kind, "device": device, "batch": batch, **figures, **others}
