"""`python -m tests.gpu OUT`: every part of the acceptance, most important first, within eight minutes.

OUT gets `acceptance.json`, which is written anew after every part, the parts' own results, and `log.txt` with their output. A
part that fails stops no other. Exit code 0 if every part that could run passed and some did, 1 if one failed or ran out of time,
3 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

from moee.parallel.machine import usable_cpus
from tests.gpu.parts import ROOT, Folders, all_parts
from tests.gpu.running import BAD, PASSED, REHEARSED, Outcome, Part, run_part

SCHEMA = "moee.gpu_acceptance/1"
WHOLE_S = 470.0
BESIDE = 4  # parts that time nothing, side by side
SLOWER = 3.0  # limits of a rehearsal, on a machine of two cores
PACKAGES = ("torch", "triton", "numpy", "onnx", "onnxruntime", "timm", "pydantic", "hdbscan", "transformers")
DEVICE_FIELDS = ("name", "driver_version", "compute_cap", "memory.total", "clocks.max.sm", "power.limit")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.gpu", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the results; made if it is not there")
    parser.add_argument("--pack", type=Path, default=ROOT / "build" / "gpu", help="what scripts/gpu_pack.sh wrote")
    parser.add_argument("--rehearse", action="store_true", help="up to the first launch, without a GPU")
    parser.add_argument("--driver", type=Path, help="folder with a double of libcuda.so.1, for a rehearsal")
    parser.add_argument("--time", type=float, default=WHOLE_S, help="seconds for all parts")
    args = parser.parse_args(argv)
    out, pack = args.out.resolve(), args.pack.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    began, device = time.monotonic(), None if args.rehearse else device_here()
    if device is None and not args.rehearse:
        print("no GPU: nvidia-smi shows none; scripts/gpu_rehearse.sh runs without one", file=sys.stderr)
        return 3
    record = Record(out, {"device": device, "rehearsal": args.rehearse, "machine": machine()}, began)
    with tempfile.TemporaryDirectory(prefix="moee-gpu-") as scratch:
        parts = list(all_parts(Folders(pack, out, Path(scratch), args.driver), args.rehearse))

        def run(part: Part) -> None:
            limited = replace(part, limit_s=part.limit_s * (SLOWER if args.rehearse else 1.0))
            record.add(run_part(limited, began + args.time - time.monotonic(), args.rehearse))

        # a rehearsal measures nothing, so no part has to be alone
        for alone, some in groupby(parts, key=lambda part: part.alone and not args.rehearse):
            with ThreadPoolExecutor(1 if alone else min(BESIDE, usable_cpus()) if args.rehearse else BESIDE) as pool:
                list(pool.map(run, some))
    return record.end()


class Record:
    """`acceptance.json` and `log.txt`, whole after every part."""

    def __init__(self, out: Path, head: dict[str, Any], began: float):
        self.out, self.head, self.began = out, head, began
        self.outcomes: list[Outcome] = []
        (out / "log.txt").write_text("", encoding="utf-8")

        self.lock = threading.Lock()

    def add(self, outcome: Outcome) -> None:
        with self.lock:
            self._add(outcome)

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"=== {outcome.part.name}: {' '.join(outcome.part.command)}\n{outcome.output}\n")
        self.write()
        more = f", {outcome.ran} checks" if outcome.ran else ""
        print(f"{outcome.part.name}: {outcome.status}{more}, {outcome.seconds:.0f} s {outcome.reason}".rstrip(), flush=True)

    def write(self) -> None:
        counts = Counter(outcome.status for outcome in self.outcomes)
        body = {
            "schema": SCHEMA, **self.head, "seconds": round(time.monotonic() - self.began, 1),
            "passed": self.passed, "counts": counts, "parts": [outcome.to_json() for outcome in self.outcomes],
        }  # fmt: skip
        fresh = self.out / "acceptance.json.new"
        fresh.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        fresh.replace(self.out / "acceptance.json")

    @property
    def passed(self) -> bool:
        """Whether something passed and nothing failed; a rehearsal never passes."""
        statuses = [outcome.status for outcome in self.outcomes]
        return PASSED in statuses and not any(status in BAD for status in statuses)

    def end(self) -> int:
        """The exit code, after the last lines."""
        counts = Counter(outcome.status for outcome in self.outcomes)
        print("; ".join(f"{count} {status}" for status, count in counts.items()), f"; {self.out / 'acceptance.json'}", sep="")
        if self.head["rehearsal"]:
            for outcome in self.outcomes:
                print(f"a device would add: {outcome.part.adds} ({outcome.part.name})")
            return 0 if counts[REHEARSED] and not any(counts[status] for status in BAD) else 1
        return 0 if self.passed else 1


def device_here() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU; None without one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(DEVICE_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    line = next(iter(done.stdout.splitlines()), "")
    return dict(zip(DEVICE_FIELDS, map(str.strip, line.split(",")), strict=False)) if done.returncode == 0 and line else None


def machine() -> dict[str, Any]:
    """Python, processor and the versions of the packages; None for one that is absent."""
    return {"python": platform.python_version(), "processor": platform.machine(), "packages": {p: _version(p) for p in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
