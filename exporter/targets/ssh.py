"""A device that ssh reaches: candidates are sent there, measured there, and their times read back."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from exporter.deploy import DEPLOY
from exporter.targets.emit import Order, write_candidates
from exporter.targets.remote import SSH_FAILED, Answer, checked_host, converse, new_mark, tar_blocks, tar_size
from exporter.targets.result import read_result, timed
from exporter.targets.roofline import board_of, device_of
from exporter.targets.target import Target
from exporter.timing.device import latency_of
from moee.errors import MissingDependency, StepFailed, UserError
from moee.planning.shortlist import Candidate, Shortlist, Timed
from moee.progress import Reporter
from moee.schema import shown
from moee.stages.session import Session
from moee.store.scratch import temporary_folder
from plugins.devices import sm_named

PREFIX = "ssh:"
ROUNDS = 5  # measure.sh's own default
LACKING = (3, 126, 127)  # exit codes of measure.sh without trtexec, and of a shell without a command
ASK = """
printf '{mark}\\n'
printf 'uid %s\\n' "$(id -u)"
printf 'trtexec %s\\n' "$(find_trtexec)"
printf 'capability %s\\n' "$(compute_capability)"
printf 'model %s\\n' "$(device_model | tr '\\n' ' ')"
"""
# One line without single quotes, backslashes or exclamation marks, since the login shell may be any. However it ends, the folder
# goes away; remote.sh, which is sent with the rest, ends when nobody is connected any more.
MEASURE = (
    'set -eu; umask 077; d=$(mktemp -d "${{TMPDIR:-/tmp}}/moee-XXXXXXXX"); clean() {{ rm -rf -- "$d"; }}; trap clean EXIT; '
    'trap "exit 143" HUP INT TERM; head -c {size} | tar -xf - -C "$d"; sh "$d/remote.sh" {rounds} {mark}'
)


@dataclass(frozen=True)
class Ssh(Target):
    """`name` is `ssh:HOST`. `sm`: what the plugin's kernels are for, where the device does not say it."""

    sm: int | None = None

    @property
    def host(self) -> str:
        return checked_host(self.name.removeprefix(PREFIX))

    @cached_property
    def facts(self) -> dict[str, str]:
        """What the device says of itself: uid, trtexec, capability, model; empty for what it does not know. Asked once."""
        mark = new_mark()
        asked = (DEPLOY / "device.sh").read_text(encoding="utf-8") + ASK.format(mark=mark)
        answer = converse(self.host, "exec sh -s", [asked.encode()], mark=mark, line=lambda text: None, silence_s=60.0)
        lines = [line.partition(" ") for line in self._answered(answer).splitlines()]
        return {word: rest.strip() for word, _, rest in lines}

    @cached_property
    def order(self) -> Order:
        """Raises `UserError` if neither the device nor the user says which SM it has."""
        capability, model = self.facts.get("capability", ""), self.facts.get("model", "")
        device = device_of(model)
        sm = self.sm or (sm_named(capability) if capability else device.sm if device is not None else None)
        if sm is None:
            raise UserError(f"{self.host} does not say which GPU it has (it is {shown(model)}); give --sm, such as --sm orin")
        return Order(self.batch, self.precision, sm)

    def check(self) -> None:
        if self.facts.get("uid") == "0":
            raise UserError(f"{self.host} logs in as root, and nothing is run as root on a device; name another user")
        if not self.facts.get("trtexec"):
            raise MissingDependency(
                f"{self.host} has no trtexec on its PATH, in TENSORRT_ROOT/bin or in /usr/src/tensorrt/bin; install TensorRT "
                "there (on a Jetson: sudo apt-get install tensorrt)"
            )
        self.order  # noqa: B018 (refuses an unknown GPU)

    def timing(self, session: Session, report: Reporter) -> Shortlist:
        board = board_of(self.facts.get("model", ""))
        ranking = latency_of(board, session, self.batch) if board is not None else None
        return Shortlist(self.most, partial(self._time, session, report), ranking)

    def _time(self, session: Session, report: Reporter, candidates: Sequence[Candidate]) -> Timed:
        with temporary_folder() as place:
            folder, result = place / "emit", place / "RESULT.json"
            folder.mkdir()
            sending = write_candidates(folder, candidates, session, self.order, report)
            shutil.copy2(DEPLOY / "remote.sh", folder)
            mark, size = new_mark(), tar_size(folder)
            steps = _Steps(self.host, 2 + len(candidates) + 1 + ROUNDS, report)
            sent = partial(_sent, f"send to {self.host} (MiB)", size, report)
            script = MEASURE.format(size=size, rounds=ROUNDS, mark=mark)
            answer = converse(self.host, script, tar_blocks(folder, sent), hold=True, mark=mark, line=steps)
            result.write_text(self._answered(answer), encoding="utf-8")
            return timed(read_result(result), sending, f"{self.host}'s RESULT.json")

    def _answered(self, answer: Answer) -> str:
        """Raises `MissingDependency` if the device was not reached, lacks something or answers nothing, `StepFailed` if what was
        run there failed."""
        said = answer.complaint or "it said nothing"
        if answer.code == SSH_FAILED:
            raise MissingDependency(f"ssh does not reach {self.host}: {said}; `ssh {self.host} true` must work unasked")
        if answer.code in LACKING:
            raise MissingDependency(f"{self.host} lacks something: {said}")
        if answer.code != 0:
            raise StepFailed(f"measuring on {self.host} failed: {said} (exit code {answer.code})")
        if not (answer.text or "").strip():
            raise MissingDependency(f"{self.host} answers nothing to what ssh runs there: {said}")
        return answer.text or ""


class _Steps:
    """Progress of measure.sh, a line of its a step."""

    def __init__(self, host: str, total: int, report: Reporter):
        self.message, self.total, self.report, self.done = f"measure on {host}", total, report, 0

    def __call__(self, line: str) -> None:
        self.done = self.total if line.startswith("RESULT.json") else min(self.done + 1, self.total - 1)
        self.report(self.message, self.done, self.total)


def _sent(message: str, size: int, report: Reporter, sent: int) -> None:
    report(message, sent >> 20, max(1, size >> 20))
