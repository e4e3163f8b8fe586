"""What a report was made from: the files that were read, and which of them are shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = (
    "summary.json", "moee.json", "export.json", "engine.json", "parity.json", "latency.json", "plan.json", "examples.json",
    "selftest.json",
)  # fmt: skip
PLAN, EXAMPLES, SELFTEST = "moee.plan", "moee.examples", "moee.selftest"
# Schema, the highest version whose fields are known here, and the command that makes it.
KINDS = {
    "moee.model": (2, "moee extract"),
    "moee.export": (1, "moee export"),
    "moee.parity": (1, "moee verify --out verify"),
    "moee.latency": (1, "moee bench --out latency.json"),
    "moee.engine": (1, "moee build"),
    "moee.summary": (1, "moee demo"),
    PLAN: (2, "moee plan"),
    EXAMPLES: (1, "moee plots"),
    SELFTEST: (1, "selftest/build/selftest"),
}


@dataclass(frozen=True)
class Artifact:
    """One file that was read. `hashes` says whether the files that it lists are as it describes them."""

    kind: str
    version: int
    path: Path
    body: dict[str, Any]
    hashes: str

    @property
    def folder(self) -> Path:
        return self.path.parent


@dataclass
class Sources:
    """Everything that was found. `artifacts` holds the one that is shown of each kind, `plans` those of one model on several
    devices, `latencies` the timings of the model that is shown, `selftests` those of several GPUs, `all` every one, `doubts` by
    kind why it is not shown, or that it may be another model's. `no_examples`: why a job made none; empty where nobody said.
    `lines`: what a job came to."""

    artifacts: dict[str, Artifact] = field(default_factory=dict)
    plans: list[Artifact] = field(default_factory=list)
    latencies: list[Artifact] = field(default_factory=list)
    selftests: list[Artifact] = field(default_factory=list)
    all: list[Artifact] = field(default_factory=list)
    plots: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    doubts: dict[str, str] = field(default_factory=dict)
    no_examples: str = ""
    lines: tuple[str, ...] = ()

    def body(self, kind: str) -> dict[str, Any] | None:
        """The manifest of a kind, or None if there is none or its version is not known here."""
        found = self.artifacts.get(kind)
        return found.body if found and found.version <= KINDS[kind][0] else None

    @property
    def missing(self) -> list[tuple[str, str]]:
        """Kinds that were not found, with the command that makes each; the summary is a demo's alone, and a self-test a GPU's."""
        known = {*self.artifacts, *self.doubts, "moee.summary", SELFTEST}
        kinds = [kind for kind in KINDS if kind not in known]
        return [(kind, KINDS[kind][1]) for kind in kinds]
