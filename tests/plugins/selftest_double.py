"""The self-test on the driver double: compiled once a session, run with a planted fault or none."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from plugins.library.cases import LayerCase, random_inputs, write_cases, write_file
from plugins.library.selftest import build_selftest
from tests.plugins import built
from tests.plugins.build_doubles import build_device, build_libraries

ROOT = built.ROOT / "selftest"
SANITIZERS = {"ASAN_OPTIONS": "detect_leaks=1:malloc_context_size=2", "UBSAN_OPTIONS": "print_stacktrace=1"}


@cache
def tables() -> Path:
    """The generated tables of the synthetic kernels, beside the plugin that has them."""
    return built.plugin().parent / "generated"


@cache
def program() -> Path:
    """The program under the sanitizers."""
    return build_selftest(ROOT / "program", tables(), sanitize=True)


@cache
def driver() -> Path:
    """The folder with a driver double that runs."""
    return build_device(ROOT / "device", tables()).parent


@cache
def libraries() -> Path:
    """The same with doubles of cuBLASLt and NVML beside it."""
    folder = ROOT / "libraries"
    build_libraries(folder)
    shutil.copy2(driver() / "libcuda.so.1", folder / "libcuda.so.1")
    return folder


def timed_layer() -> LayerCase:
    """A layer that asks to be timed, small enough for the double."""
    inputs = random_inputs(17, 64, [24, 24, 24, 24], 60, 20)
    return LayerCase(name="blocks.3.mlp", inputs=inputs, timed=("float16",), per_image=17, dense_width=96, is_layer=True)


@cache
def cases() -> Path:
    """All cases, with a layer in front."""
    ROOT.mkdir(parents=True, exist_ok=True)
    return write_cases(ROOT / "cases.bin", [timed_layer()])


@cache
def few_cases() -> Path:
    """The layer, and cases that planted faults need: ties and top-2, a NaN and an expert without tokens, two groups of tokens."""
    ties, lost = random_inputs(12, 32, [9, 5, 16], 20, 21), random_inputs(12, 32, [9, 5, 16], 20, 22)
    ties["router"][2], ties["router_bias"][2] = ties["router"][0], ties["router_bias"][0]
    lost["x"][3, 5], lost["router_bias"][2] = float("nan"), -1e4
    ROOT.mkdir(parents=True, exist_ok=True)
    few = [LayerCase(name="ties", inputs=ties, top_k=2, exact_ties=True), LayerCase(name="lost", inputs=lost)]
    few.append(LayerCase(name="two groups", inputs=random_inputs(140, 16, [4, 3], 6, 23), types=("float16",)))
    return write_file(ROOT / "few.bin", [timed_layer(), *few])


def run(
    out: Path, *arguments: str, fault: str = "", library_path: Path | None = None, program_: Path | None = None,
    cases_: Path | None = None, **environment: str,
) -> subprocess.CompletedProcess:  # fmt: skip
    """Run the program; results go to `out`. `fault` is planted in the double; cases are the few, but for `cases_`."""
    places = ["--plugin", str(built.plugin()), "--cases", str(cases_ or few_cases()), "--out", str(out)]
    variables = {**os.environ, **SANITIZERS, "MOEE_FAKE_SM": "87", "MOEE_FAKE_FAULT": fault, **environment}
    variables["LD_LIBRARY_PATH"] = str(library_path or driver())
    command = [str(program_ or program()), *places, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)

