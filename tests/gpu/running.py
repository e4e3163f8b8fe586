"""Runs one part of the acceptance in a process of its own, within its time, and judges what came of it.

Only `PASSED` is good. What had nothing to run, what the machine cannot do and what was not begun are told apart from it and from
one another.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PASSED, FAILED, LATE = "passed", "failed", "out of time"
EMPTY, IMPOSSIBLE, LEFT = "nothing ran", "not possible here", "not begun"
REHEARSED = "rehearsed"
BAD = (FAILED, LATE)
MOST_LOG = 1 << 20  # bytes of one part's output that are kept, from its end
COLLECTED = re.compile(r"^(\d+)(?:/\d+)? tests? collected", re.MULTILINE)
IMPOSSIBLE_EXIT = 3  # this project's programs: the environment lacks something


@dataclass(frozen=True)
class Part:
    """One part. How much ran says `result`, the JSON file that it writes, `report`, the JUnit file of pytest, or, where that only
    collects (`counts_collected`), its last line.

    `alone`: it times something, so nothing runs beside it. `files` must be there, or it is not possible. `refusals` are words of
    its output by which a tool says that this machine does not allow it. `adds` is what a real device shows beyond a rehearsal.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    adds: str
    result: Path | None = None
    report: Path | None = None
    counts_collected: bool = False
    alone: bool = True
    files: Sequence[Path] = ()
    refusals: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What came of a part: `status`, `reason` where it is not good, how many checks `ran`, details for the summary, output."""

    part: Part
    status: str
    reason: str = ""
    seconds: float = 0.0
    ran: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    output: str = ""

    def to_json(self) -> dict[str, Any]:
        body = {"name": self.part.name, "status": self.status, "ran": self.ran, "seconds": round(self.seconds, 1)}
        body |= {"reason": self.reason} if self.reason else {}
        return {**body, "limit_s": self.part.limit_s, "command": list(self.part.command), **self.details}


def run_part(part: Part, left_s: float, rehearsal: bool = False) -> Outcome:
    """Run a part within its limit and the `left_s` seconds of the whole."""
    missing = [str(path) for path in part.files if not path.exists()]
    if missing:
        return Outcome(part, IMPOSSIBLE, f"{', '.join(missing)} is not there; run scripts/gpu_pack.sh")
    if left_s < 5.0:
        return Outcome(part, LEFT, "no time was left")
    for old in (part.result, part.report):
        if old is not None:
            old.unlink(missing_ok=True)
    started = time.monotonic()
    code, output = _run(part, min(part.limit_s, left_s))
    outcome = judge(part, code, output)
    outcome.seconds, outcome.output = time.monotonic() - started, output
    if rehearsal and outcome.status == PASSED:
        outcome.status = REHEARSED
    return outcome


def _run(part: Part, limit_s: float) -> tuple[int | None, str]:
    """Exit code (None: it ran out of time) and the end of the output; whatever the part started is ended with it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
    try:
        process = subprocess.Popen(
            part.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return IMPOSSIBLE_EXIT, f"{part.command[0]} cannot be started: {error.strerror}"
    code: int | None = None
    try:
        raw, _ = process.communicate(timeout=limit_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own group, with all that it started
        raw, _ = process.communicate()
    return code, raw[-MOST_LOG:].decode(errors="replace")


def judge(part: Part, code: int | None, output: str) -> Outcome:
    """The outcome of a part that ended with `code` (None: out of time)."""
    judged = _judged_collection if part.counts_collected else _judged_tests if part.report is not None else _judged_result
    outcome = judged(part, output)
    refused = next((line.strip() for line in output.splitlines() if any(word in line for word in part.refusals)), None)
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "it said nothing")
    if code is None:
        outcome.status, outcome.reason = LATE, f"stopped at its limit; its last line: {last[:200]}"
    elif refused is not None:
        outcome.status, outcome.reason = IMPOSSIBLE, refused[:300]
    elif code == IMPOSSIBLE_EXIT and outcome.status != FAILED:
        outcome.status, outcome.reason = IMPOSSIBLE, last[:300]
    elif outcome.status == PASSED and code != 0:
        outcome.status, outcome.reason = FAILED, f"exit code {code}; its last line: {last[:200]}"
    elif outcome.status == EMPTY and code not in (0, 5):  # pytest's exit code 5: no tests
        outcome.status, outcome.reason = FAILED, f"exit code {code}; its last line: {last[:200]}"
    return outcome


def _judged_collection(part: Part, output: str) -> Outcome:
    found = COLLECTED.search(output)
    number = int(found[1]) if found else 0
    return Outcome(part, PASSED, ran=number) if number else Outcome(part, EMPTY, "no test was collected")


def _judged_tests(part: Part, output: str) -> Outcome:
    """By pytest's JUnit file: passed only if a test passed and none failed."""
    assert part.report is not None
    try:
        cases = list(ElementTree.parse(part.report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return Outcome(part, EMPTY, "no test report was written")
    bad = [(case, child) for case in cases for child in case if child.tag in ("failure", "error")]
    skipped = [child.get("message", "") for case in cases for child in case if child.tag == "skipped"]
    good = len(cases) - len({id(case) for case, _ in bad}) - len(skipped)
    details: dict[str, Any] = {"skipped": len(skipped)}
    if skipped:
        details["why_skipped"] = sorted(set(skipped))
    if bad:
        details["failures"] = [{"test": c.get("name", ""), "message": child.get("message", "")[:500]} for c, child in bad]
        return Outcome(part, FAILED, f"{len(bad)} of {len(cases)} tests failed", ran=good + len(bad), details=details)
    if not good:
        return Outcome(part, EMPTY, "every test was skipped" if skipped else "no test was selected", details=details)
    return Outcome(part, PASSED, ran=good, details=details)


def _judged_result(part: Part, output: str) -> Outcome:
    """By the JSON file of a program: `passed`, and how many `checks` it holds (a list, or their number)."""
    if part.result is None or not part.result.is_file():
        return Outcome(part, EMPTY, "no result was written")
    try:
        body = json.loads(part.result.read_text(encoding="utf-8"))
        ran = body["checks"] if isinstance(body["checks"], int) else len(body["checks"])
        passed = body["passed"]
    except (ValueError, KeyError, TypeError) as error:
        return Outcome(part, FAILED, f"{part.result.name} is no result: {error!r}")
    if passed is not True:
        wrong = [str(c.get("name")) for c in body["checks"] if not c.get("passed")] if isinstance(body["checks"], list) else []
        return Outcome(part, FAILED, f"wrong: {', '.join(wrong[:20]) or body.get('reason', 'see the file')}", ran=ran)
    return Outcome(part, PASSED, ran=ran) if ran else Outcome(part, EMPTY, "nothing was checked")
