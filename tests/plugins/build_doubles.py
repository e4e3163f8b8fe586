"""Compiles the test-double driver and the harness."""

from __future__ import annotations

import subprocess
from pathlib import Path

from plugins.library.build import SOURCE, select_headers

CSRC = Path(__file__).parent / "csrc"


def compile_shared(source: Path, out: Path, *options: str) -> Path:
    """Compile one C++ file into a shared library."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = ["c++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", str(source)]
    done = subprocess.run([*command, "-o", str(out), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def build_driver(folder: Path) -> Path:
    """The test double as `folder/libcuda.so.1`, under the real driver's name."""
    return compile_shared(CSRC / "fake_cuda.cpp", folder / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")


def build_harness(folder: Path) -> Path:
    """The ctypes harness as `folder/libharness.so`."""
    includes = ["-isystem", str(select_headers().include), "-isystem", str(SOURCE / "csrc" / "compat")]
    return compile_shared(CSRC / "harness.cpp", folder / "libharness.so", *includes, "-ldl")


def build_nvinfer(folder: Path, *options: str) -> Path:
    """The registry double as `folder/libnvinfer.so.10`."""
    includes = ["-isystem", str(select_headers().include), "-isystem", str(SOURCE / "csrc" / "compat")]
    return compile_shared(CSRC / "fake_nvinfer.cpp", folder / "libnvinfer.so.10", *includes, *options)
