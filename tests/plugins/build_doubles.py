"""Compiles the doubles: the driver, with or without kernels that run, cuBLASLt, NVML and TensorRT's registry."""

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


def build_device(folder: Path, tables: Path, modules: Path | None = None) -> Path:
    """A driver double that runs the kernels of `tables`, a folder that `embed` wrote, as `folder/libcuda.so.1`.

    `modules`: another modules.cpp than the folder's.
    """
    csrc, selftest = SOURCE / "csrc", SOURCE / "selftest"
    others = [CSRC / "fake_device.cpp", CSRC / "fake_kernels.cpp", CSRC / "fake_groups.cpp", csrc / "operator" / "operator.cpp"]
    sources = [str(path) for path in (*others, tables / "tables.cpp", modules or tables / "modules.cpp")]
    includes = ["-I", str(csrc), "-I", str(selftest), "-I", str(csrc / "compat"), "-isystem", str(select_headers().include)]
    flags = [f'-DMOEE_BLOB="{tables / "kernels.bin"}"', "-O2", "-fno-omit-frame-pointer", "-Wl,-soname,libcuda.so.1"]
    return compile_shared(CSRC / "fake_cuda.cpp", folder / "libcuda.so.1", *sources, *includes, *flags)


def build_libraries(folder: Path) -> None:
    """Doubles of cuBLASLt and NVML for a device double, in `folder`."""
    selftest, csrc = SOURCE / "selftest", SOURCE / "csrc"
    places = ["-I", str(csrc), "-I", str(selftest), "-I", str(csrc / "compat"), "-isystem", str(select_headers().include)]
    operator = str(csrc / "operator" / "operator.cpp")
    compile_shared(CSRC / "fake_cublaslt.cpp", folder / "libcublasLt.so.13", operator, *places, "-O2", "-ldl")
    compile_shared(CSRC / "fake_nvml.cpp", folder / "libnvidia-ml.so.1")


def build_driver(folder: Path) -> Path:
    """The test double as `folder/libcuda.so.1`, under the real driver's name."""
    return compile_shared(CSRC / "fake_cuda.cpp", folder / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")


def build_nvinfer(folder: Path, *options: str) -> Path:
    """The registry double as `folder/libnvinfer.so.10`."""
    includes = ["-isystem", str(select_headers().include), "-isystem", str(SOURCE / "csrc" / "compat")]
    return compile_shared(CSRC / "fake_nvinfer.cpp", folder / "libnvinfer.so.10", *includes, *options)
