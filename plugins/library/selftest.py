"""The self-test: its folder in a bundle, the program compiled here, and what selftest.json must hold."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moee.errors import MissingDependency
from moee.parallel.machine import usable_cpus
from moee.schema import Body, checked, upgraded
from moee.store.artifact import read_json
from moee.store.atomic import atomic_file
from plugins.library.build import SOURCE, find_cmake, run_logged, select_headers
from plugins.library.cases import LayerCase, write_cases

PROGRAM = "selftest"
CASES = "cases.bin"
SCHEMA = "moee.selftest/1"


def write_selftest(folder: Path, layers: Sequence[LayerCase] = ()) -> Path:
    """Write the program's sources and its cases into the new `folder` of a bundle. Raises `UserError` as `write_cases`."""
    shutil.copytree(SOURCE / "selftest", folder)
    write_cases(folder / CASES, layers)
    return folder


def build_selftest(
    out_dir: Path, tables: Path, *, tensorrt_root: Path | None = None, sanitize: bool = False, jobs: int | None = None
) -> Path:
    """Compile the program and return its path, in `out_dir`. `tables` is the folder that `build_plugin` left as `generated`.

    Raises `MissingDependency` without cmake, a compiler or headers, `StepFailed` if compiling fails: the compiler's output is in
    `out_dir/build.log`.
    """
    out_dir = Path(out_dir).resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    headers, cmake = select_headers(tensorrt_root), find_cmake()
    for tool, package in ((cmake, "cmake"), (shutil.which("c++"), "g++")):
        if tool is None:
            raise MissingDependency(f"{package} is not installed; run `apt-get install {package}`")
    build = out_dir / "build"
    configure = [
        *(str(cmake), "-S", str(SOURCE / "selftest"), "-B", str(build)),
        f"-DMOEE_TABLES={Path(tables).resolve()}",
        f"-DTENSORRT_INCLUDE={headers.include}",
        f"-DMOEE_SANITIZE={'ON' if sanitize else 'OFF'}",
    ]
    run_logged(configure, out_dir / "build.log", "the self-test")
    run_logged([str(cmake), "--build", str(build), "-j", str(jobs or usable_cpus())], out_dir / "build.log", "the self-test")
    with atomic_file(out_dir / PROGRAM) as temporary:
        shutil.copy2(build / PROGRAM, temporary)
    return out_dir / PROGRAM


class Check(Body):
    """One check. One that compared nothing has not passed."""

    name: str
    meaning: str
    passed: bool
    comparisons: int = Field(ge=0)
    failed: int = Field(ge=0)
    failures: list[str]


class Accuracy(Body):
    """The worst element of one tactic in one case and type; null where it is not finite."""

    case: str
    type: Literal["float32", "float16", "bfloat16"]
    tactic: str
    error: float | None
    bound: float


class Workspace(Body):
    """Bytes that the plugin asked TensorRT for."""

    case: str
    type: Literal["float32", "float16", "bfloat16"]
    bytes: int = Field(ge=1)


class Emulated(Body):
    """What stands for another GPU; null where nothing does."""

    multiprocessors: int | None
    code: int | None


class TacticTime(Body):
    """Microseconds of one call."""

    name: str
    p50_us: float
    p95_us: float


class DenseTime(Body):
    """The dense FFN: what computed it, and in what it differs from the layer's."""

    by: str
    note: str
    p50_us: float
    p95_us: float


class Timing(Body):
    """Routed against dense: `ratio` is dense over routed, `ideal_share` what it is of the saving in MACs."""

    case: str
    type: Literal["float32", "float16", "bfloat16"]
    batch: int
    tokens: int
    emulated: bool
    buffer_sets: int
    samples: int
    winner: str
    tactics: list[TacticTime]
    dense: DenseTime
    ratio: float
    mac_share: float
    ideal_share: float
    sm_mhz: float | None
    memory_mhz: float | None
    power_w: float | None
    temperature_c: float | None


class SelfTest(Body):
    """selftest.json."""

    passed: bool
    native: bool
    label: str
    emulated: Emulated
    device: dict[str, Any]
    kernels: str
    compiled_ptx: list[str]
    types_without_kernels: list[str]
    cases: list[dict[str, Any]]
    checks: list[Check]
    accuracy: list[Accuracy]
    workspaces: list[Workspace]
    timing: list[Timing]
    not_timed: str | None
    seconds: float


def read_selftest(path: Path) -> SelfTest:
    """Read and check selftest.json. Raises `UserError` for another schema or a malformed file."""
    return checked(SelfTest, upgraded(read_json(path), SCHEMA, path), path)
