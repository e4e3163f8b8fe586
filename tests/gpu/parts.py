"""The parts of the acceptance, most important first, and what a rehearsal runs in the place of each."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.running import Part

ROOT = Path(__file__).resolve().parents[2]
MARKED = re.compile(r"\bmark\.gpu\b")
TIMED = ("tests/plugins/test_selftest_gpu.py", "tests/exporter/test_engine_gpu.py")  # they compare times
FIRST = ("tests/plugins/test_pytorch.py", "tests/plugins/test_kernels.py")
# what a driver or a virtual machine says that does not let a tool at the device
SANITIZER_REFUSALS = ("Device not supported", "not supported on this", "Unable to find injection", "error 999")


def gpu_tests() -> list[str]:
    """Every test file that has tests of the marker `gpu`."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if MARKED.search(path.read_text(encoding="utf-8"))]


@dataclass(frozen=True)
class Folders:
    """`pack`: what `tests.gpu.pack` wrote. `out`: the results. `scratch`: what nobody reads after the verdict. `driver`: holds a
    double of the driver, for a rehearsal."""

    pack: Path
    out: Path
    scratch: Path
    driver: Path | None = None


def libraries(driver: Path | None) -> str:
    """Where the selftest finds its libraries: the driver's double, and cuBLASLt of PyTorch's wheels."""
    found = [driver] if driver is not None else []
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        found += sorted({path.parent for path in Path(folder).glob("*/lib/libcublasLt.so*")})
    return os.pathsep.join([*map(str, found), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])


def all_parts(at: Folders, rehearsal: bool) -> Iterator[Part]:
    """The parts in order; those that time nothing run beside their neighbours of the kind."""
    pack, out, scratch = at.pack / "selftest", at.out, at.scratch
    programs = [pack / name for name in ("selftest", "libmoee_plugin.so", "cases.bin", "small.bin")]
    selftest = [str(programs[0]), "--plugin", str(programs[1]), "--cases"]
    whole_cases, small = [str(programs[2])], [str(programs[3]), "--quick", "--check-only"]
    environment = {"LD_LIBRARY_PATH": libraries(at.driver)}

    def module(result: Path, *more: str) -> list[str]:
        return [sys.executable, "-m", f"tests.gpu.{result.stem}", "--out", str(result), *more]

    whole, rules, alike, rank = out / "whole_model.json", out / "rules.json", out / "against_cpu.json", scratch / "one_rank.json"
    here = ["--device", "cpu"] if rehearsal else []

    yield Part(
        "selftest", [*selftest, *(small if rehearsal else whole_cases), "--out", str(out / "selftest.json")], 90,
        "the kernels' numbers and times", result=out / "selftest.json", files=programs,
        environment=environment,
    )  # fmt: skip
    if rehearsal:
        yield _collected(gpu_tests())
    for name in () if rehearsal else FIRST:
        yield _tests(name, scratch)
    yield Part(
        "extract, finetune, plan", module(alike, *here), 120, "the same three commands on CUDA against the CPU", result=alike,
        alone=False, environment={} if rehearsal else {"OMP_NUM_THREADS": "4"},
    )  # fmt: skip
    yield Part("nccl, one rank", module(rank, *here), 60, "nccl in the place of gloo", result=rank, alone=False)
    yield Part(
        "whole model", module(whole, *here), 160,
        "times of dinov2-s and DeiT-B, dense against experts and static, compiled and as CUDA graphs", result=whole,
    )  # fmt: skip
    files = [] if rehearsal else gpu_tests()
    for name in (file for file in files if file in TIMED):
        yield _tests(name, scratch)
    yield Part(
        "rules", module(rules, *here), 60, "which tactic is fastest at which size, and whether training under a mask is",
        result=rules,
    )  # fmt: skip
    for name in (file for file in files if file not in (*FIRST, *TIMED)):
        yield _tests(name, scratch)
    for tool in ("memcheck", "racecheck"):
        result = scratch / f"sanitizer_{tool}.json"
        command = [*selftest, *small, "--out", str(result)]
        watched = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", *command]
        yield Part(
            f"compute-sanitizer {tool}", command if rehearsal else watched, 90, "bad addresses and races on the device",
            result=result, files=programs, alone=False, refusals=SANITIZER_REFUSALS, environment=environment,
        )  # fmt: skip


def _pytest(*files: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files, "-o", "addopts=", "-q", "-m", "gpu"]


def _tests(name: str, scratch: Path) -> Part:
    """pytest on one file's tests of the marker `gpu`."""
    report = scratch / f"{Path(name).stem}.xml"
    several = ["-n", "6"] if name in FIRST and importlib.util.find_spec("xdist") else []  # Triton compiles for most of the time
    command = [*_pytest(name), "-rs", f"--junitxml={report}", *several]
    return Part(name, command, 90, "these tests", report=report, alone=name in TIMED)


def _collected(files: list[str]) -> Part:
    """All of them collected, which a rehearsal does."""
    return Part("GPU tests", [*_pytest(*files), "--collect-only"], 120, "their runs", counts_collected=True, alone=False)
