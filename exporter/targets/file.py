"""A device that is known by the RESULT.json that measure.sh wrote there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from exporter.targets.emit import collect
from exporter.targets.result import read_result, timed
from exporter.targets.target import Target
from moee.planning.shortlist import Candidate, Shortlist, Timed
from moee.progress import Reporter
from moee.stages.session import Session
from moee.store.scratch import temporary_folder

ENDING = ".json"


@dataclass(frozen=True)
class ResultFile(Target):
    """`name` is the file. Its times are of the candidates that were sent to the device and of no others. They are made again
    here, and known by their ids."""

    def check(self) -> None:
        read_result(self.name)

    def timing(self, session: Session, report: Reporter) -> Shortlist:
        return Shortlist(len(read_result(self.name).candidates), partial(self._time, session, report))

    def _time(self, session: Session, report: Reporter, candidates: Sequence[Candidate]) -> Timed:
        with temporary_folder() as folder:
            sending, _ = collect(folder, candidates, session, self.batch, precision=self.precision, report=report)
        return timed(read_result(self.name), sending, self.name)
