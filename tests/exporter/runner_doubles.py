"""Compiles the bundle's runner, and stand-ins for libnvinfer and libcuda that run it without a GPU."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

from exporter.deploy import DEPLOY
from plugins.library.build import SOURCE, select_headers

CSRC = Path(__file__).parent / "csrc"
ROOT = Path(__file__).resolve().parent.parent.parent / "build" / "test-runner"
RUNNER = DEPLOY / "runner"
STUBBED = {"VRuntime": "NvInferImpl.h", "VCudaEngine": "NvInferImpl.h", "VExecutionContext": "NvInferImpl.h",
           "IPluginRegistry": "NvInferRuntimeCommon.h"}  # fmt: skip
FLAGS = ("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def _compile(out: Path, sources: list[Path], *options: str) -> Path:
    """Compile unless `out` is newer than everything that it is made from."""
    inputs = [*sources, *RUNNER.glob("*.h"), *CSRC.glob("*.cpp"), *out.parent.glob("stubs.h")]
    if not out.is_file() or any(p.stat().st_mtime > out.stat().st_mtime for p in inputs):
        out.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["c++", *FLAGS, *map(str, sources), "-o", str(out), *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return out


def _tensorrt() -> list[str]:
    return ["-isystem", str(select_headers().include), "-isystem", str(SOURCE / "csrc" / "compat"), "-I", str(RUNNER)]


@cache
def preprocess() -> Path:
    """moee_preprocess, sanitized."""
    sources = [RUNNER / name for name in ("image.cpp", "preprocess.cpp", "preprocess_main.cpp")]
    return _compile(ROOT / "moee_preprocess", sources, *SANITIZE)


@cache
def run() -> Path:
    """moee_run."""
    sources = [RUNNER / name for name in ("main.cpp", "engine.cpp", "cuda.cpp", "image.cpp", "preprocess.cpp")]
    return _compile(ROOT / "moee_run", sources, *_tensorrt(), "-ldl")


@cache
def fakes() -> Path:
    """The folder with the stand-ins, under the real libraries' names."""
    _compile(ROOT / "libcuda.so.1", [CSRC / "fake_cuda.cpp"], "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")
    stubs = (
        '#include <NvInferRuntime.h>\n#include <cstdlib>\n#pragma GCC diagnostic ignored "-Wdeprecated-declarations"\n'
        + "".join(map(_stub, STUBBED))
    )
    path = ROOT / "stubs.h"
    if not path.is_file() or path.read_text() != stubs:
        path.write_text(stubs)
    name = f"libnvinfer.so.{select_headers().major}"
    _compile(
        ROOT / name,
        [CSRC / "fake_runtime.cpp"],
        "-shared",
        "-fPIC",
        "-Wno-deprecated-declarations",
        "-isystem",
        str(ROOT),
        *_tensorrt(),
    )
    return ROOT


def _stub(name: str) -> str:
    """A class that overrides every pure method of a TensorRT interface with one that aborts."""
    text = (select_headers().include / STUBBED[name]).read_text()
    body = re.search(rf"^class {name}\b.*?^\}};", text, re.MULTILINE | re.DOTALL)
    assert body is not None, f"{name} not found in TensorRT's headers"
    plain = re.sub(r"//[^\n]*|/\*.*?\*/|^#if ENABLE.*?^#endif[^\n]*", "", body.group(), flags=re.DOTALL | re.MULTILINE)
    pure = re.findall(r"virtual\s+([^;{}]+?)\s*=\s*0\s*;", plain)
    assert pure, f"{name} has no pure methods"
    methods = "".join(f"    {' '.join(signature.split())} override {{ std::abort(); }}\n" for signature in pure)
    clear = "#undef TRT_NODISCARD\n#define TRT_NODISCARD\n"
    return f"{clear}namespace nvinfer1::apiv {{\nclass Stub{name[1:]} : public {name} {{\npublic:\n{methods}}};\n}}\n"
