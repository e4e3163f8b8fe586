"""Commands with faults: the client of `zygote`, and what a workspace looks like before and after."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability import faults

ROOT = Path(__file__).resolve().parents[2]
UNSTABLE = {"seconds", "peak_memory_bytes", "build_s"}  # of JSON files: measured anew in every run
TIME_ATTRIBUTES = re.compile(rb'\b(time|timestamp)="[^"]*"')  # of junit.xml
TIMED = {"latency.json", "summary.json"}  # timings from end to end: compared by their keys


@dataclass(frozen=True)
class Outcome:
    """`code` is the exit code, negative for a signal; `changes` counts the calls that changed files."""

    code: int
    text: str
    changes: int
    seconds: float
    orphans: int

    @property
    def killed(self) -> bool:
        return self.code == -9


class Zygote:
    """The warm process. `parts`: see `zygote._warm_up`."""

    def __init__(self, folder: Path, *parts: str):
        library = faults.compile_library(folder)
        self.plan = faults.Plan(folder / "plan")
        environment = {
            **os.environ, "LD_PRELOAD": str(library), "FAULTS": str(self.plan.path), "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(folder),
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.reliability.zygote", *parts]
        self.errors = open(folder / "zygote.log", "w")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment, cwd=ROOT
        )
        self.threads = self._answer()["threads"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the zygote ended: {Path(self.errors.name).read_text()[-2000:]}"
        return json.loads(line)

    def run(
        self, argv: list[str], cwd: Path, mode: int = faults.COUNT, at: int = 0, error: int = 0, no_renameat2: bool = False,
        root: Path | None = None, victim: Path | None = None, **request: Any,
    ) -> Outcome:  # fmt: skip
        """Run `moee ARGV` in the workspace `cwd`, with a fault at the `at`-th change below `root` (the workspace)."""
        env = {"MOEE_CACHE": str(cwd / "cache"), "TMPDIR": str(cwd / "tmp"), **request.pop("env", {})}
        log = cwd.parent / f"{cwd.name}.log"
        self.plan.arm(mode, root or cwd, at, error, no_renameat2, victim)
        asked = {"argv": [str(a) for a in argv], "cwd": str(cwd), "env": env, "log": str(log), **request}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        changes = self.plan.disarm()
        text = log.read_text(errors="replace")
        assert not answer["late"], f"{argv[0]} did not end: {text[-2000:]}"
        return Outcome(answer["code"], text, changes, answer["seconds"], answer["orphans"])

    def run_together(self, argvs: list[list[str]], cwd: Path, **request: Any) -> list[tuple[int, str]]:
        """Run command lines at the same time; exit code and output of each."""
        env = {"MOEE_CACHE": str(cwd / "cache"), "TMPDIR": str(cwd / "tmp"), **request.pop("env", {})}
        log = cwd.parent / f"{cwd.name}.crowd"
        asked = {"crowd": argvs, "cwd": str(cwd), "env": env, "log": str(log), **request}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        codes = self._answer()["codes"]
        return [(code, Path(f"{log}.{i}").read_text(errors="replace")) for i, code in enumerate(codes)]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.errors.close()


TEXTS = {".json", ".html", ".md", ".xml"}


def digest(path: Path, root: Path) -> str:
    """Hash of a file; without the name of the workspace `root`, and of JSON without what is measured anew in every run."""
    data = path.read_bytes().replace(os.fsencode(root), b"ROOT") if path.suffix in TEXTS else path.read_bytes()
    if path.suffix == ".json" and (body := _parsed(data)) is not None:
        if isinstance(body, dict) and isinstance(body.get("files"), dict):  # hashes of files that are compared themselves
            body["files"] = sorted(body["files"])
        data = json.dumps(_shape(body) if path.name in TIMED else _stable(body), sort_keys=True).encode()
    if path.suffix == ".html" and (path.parent / "latency.json").exists():  # the demo's report shows its timings
        data = b""
    if path.suffix == ".xml":
        data = TIME_ATTRIBUTES.sub(b"", data)
    return hashlib.sha256(data).hexdigest()


def _parsed(data: bytes) -> Any:
    """None for half a file, which lies in the temporary folder of a killed run."""
    try:
        return json.loads(data)
    except ValueError:
        return None


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _stable(v) for k, v in value.items() if k not in UNSTABLE}
    return [_stable(v) for v in value] if isinstance(value, list) else value


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _shape(v) for k, v in value.items()}
    return type(value).__name__


def tree(root: Path, raw: bool = False) -> dict[str, str]:
    """Relative path to hash of every file below `root`, hidden ones included; folders end in a slash. The cache's locks are left
    out: they hold nothing, and a process that was killed leaves its own."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink() or f"{name}/".startswith("cache/locks/"):
            continue
        if path.is_dir():
            found[f"{name}/"] = ""
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if raw else digest(path, root)
    return found
