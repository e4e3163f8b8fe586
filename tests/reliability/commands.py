"""The long commands on the tiny model: their arguments, what they make, and the workspace that they start from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.reliability.runner import Zygote
from tests.reliability.tiny_vit import NAME, write_images, write_weights

MODEL = [NAME, "--weights", "w.safetensors", "--data", "images"]
KMEANS = ["--clusters", "4", "--cluster-tokens", "400", "--tokens", "2000"]
ABLATE = [
    *("--tables", "2", "--seeds", "1", "--keep", "0.7", "--compensation", "none", "--tokens", "600"),
    *("--cluster-tokens", "300", "--components", "8", "--min-cluster-size", "0.05"),
]
GRID = [
    *("--routers", "linear,centroid", "--ranks", "12", "--residual-rank", "4", "--experts", "2"),
    *("--calibration-images", "20", "--seeds", "1"),
]


@dataclass(frozen=True)
class Command:
    """`argv` writes `out`; with `force`, over what `before` (another run) has put there. `needs` are made first.

    `resumes`: what lies in `out` after a kill is kept and gone on from, so there is no earlier artifact.
    """

    name: str
    argv: list[str]
    out: str
    needs: tuple[str, ...] = ()
    before: list[str] | None = None
    resumes: bool = False
    options: dict = field(default_factory=dict)

    def forced(self) -> list[str]:
        return self.argv if self.resumes or self.out == "latency.json" else [*self.argv, "--force"]


def _extract(*method: str) -> list[str]:
    return ["extract", *MODEL, *method]


COMMANDS = {
    c.name: c
    for c in (
        Command(
            "extract", [*_extract(*KMEANS), "--out", "extracted"], "extracted",
            before=[*_extract(*KMEANS, "--keep", "0.7"), "--out", "extracted"],
        ),
        Command(
            "extract clear-moe",
            [*_extract("--method", "clear-moe", "--rank", "8", "--residual-rank", "4", "--experts", "2"), "--out", "clear"],
            "clear",
            before=[*_extract("--method", "clear-moe", "--rank", "6", "--residual-rank", "2"), "--out", "clear"],
        ),
        Command(
            "finetune", ["finetune", "extracted", "--epochs", "3", "--out", "tuned"], "tuned", ("extract",),
            before=["finetune", "extracted", "--epochs", "1", "--out", "tuned"],
        ),
        Command(
            "export", ["export", "extracted", "--out", "export"], "export", ("extract",),
            before=["export", "extracted", "--precision", "fp16", "--out", "export"],
        ),
        Command(
            "verify", ["verify", "export", "--images", "15", "--out", "verify"], "verify", ("extract", "export"),
            before=["verify", "export", "--images", "9", "--out", "verify"],
        ),
        Command(
            "bench",
            ["bench", "export", "--runs", "2", "--duration", "0", "--throughput", "0", "--batch", "2", "--out", "latency.json"],
            "latency.json", ("extract", "export"),
            before=["bench", "export", "--runs", "1", "--duration", "0", "--throughput", "0", "--out", "latency.json"],
        ),
        Command(
            "build", ["build", "export", "--plugin", "plugin.so", "--opt-shapes", "2", "--max-shapes", "4", "--out", "engine"],
            "engine", ("extract", "export"),
            before=["build", "export", "--plugin", "plugin.so", "--opt-shapes", "1", "--max-shapes", "2", "--out", "engine"],
        ),
        Command(
            "bundle", ["bundle", "export", "--sm", "87", "--max-shapes", "8", "--out", "bundle"], "bundle",
            ("extract", "export"), before=["bundle", "export", "--sm", "87", "--max-shapes", "16", "--out", "bundle"],
        ),
        Command(
            "plan",
            ["plan", *MODEL, "--min-cosine", "0.5", "--methods", "kmeans-8,static", "--targets", "0.8,0.6",
             "--cluster-tokens", "300", "--out", "plan"],
            "plan",
            before=["plan", *MODEL, "--min-cosine", "0.5", "--methods", "static", "--targets", "0.8", "--out", "plan"],
        ),
        Command("ablate", ["ablate", "--model", *MODEL, *ABLATE, "--out", "ablation"], "ablation", resumes=True),
        Command(
            "ablate-clear", ["ablate-clear", *MODEL, *GRID, "--out", "ablation-clear"], "ablation-clear", resumes=True
        ),
        Command(
            "report", ["report", "extracted", "export", "--out", "report.html"], "report.html", ("extract", "export"),
            before=["report", "extracted", "--out", "report.html"],
        ),
        Command(
            "plots", ["plots", "extracted", "--images", "9", "--out", "plots"], "plots", ("extract",),
            before=["plots", "extracted", "--images", "6", "--out", "plots"],
        ),
        Command(
            "demo", ["demo", "--epochs", "1", "--out", "demo"], "demo", before=None, options={"small_demo": True, "timeout": 300}
        ),
    )
}  # fmt: skip


def prepare(zygote: Zygote, folder: Path, command: Command, plugin: Path | None = None, compiled: Sequence[Path] = ()) -> Path:
    """A workspace with the inputs, what `command` needs, and an earlier artifact where its output goes."""
    work = folder / command.name.replace(" ", "-")
    work.mkdir()
    (work / "tmp").mkdir(mode=0o777)
    write_images(work / "images")
    write_weights(work / "w.safetensors")
    if plugin is not None:
        os.link(plugin, work / "plugin.so")
    (work / "cache").mkdir()
    for part in compiled:
        (work / "cache" / part.name).symlink_to(part)
    for argv in [*(COMMANDS[name].argv for name in command.needs), *([command.before] if command.before else [])]:
        outcome = zygote.run(argv, work)
        assert outcome.code == 0, outcome.text
    return work


def copy(work: Path, target: Path) -> Path:
    """A copy of a workspace, whose artifacts name its own folder where they name that of `work`; links into the real cache stay
    links."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(work, target, symlinks=True)
    for path in target.rglob("*.json"):
        text = path.read_bytes()
        if not path.is_symlink() and os.fsencode(work) in text:
            path.write_bytes(text.replace(os.fsencode(work), os.fsencode(target)))
    return target
