"""Compiles the operator for ONNX Runtime's CPU provider with the system's C++ compiler, and says what a library was built for.

A wheel brings libraries that were compiled for several processors (`PREBUILT`); a source tree has none. No headers are needed:
`csrc/ort.h` declares what the operator uses of ONNX Runtime's C interface, by its fixed places.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moee.errors import MissingDependency, UserError
from moee.store.atomic import atomic_file
from plugins.library.build import elf_machine, run_logged

LIBRARY = "libmoee_onnxruntime.so"
SOURCES = Path(__file__).resolve().parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-fvisibility=hidden")
SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PREBUILT = Path(__file__).resolve().parent / "prebuilt"
HASH = "sources.sha256"  # beside them
MACHINES = ("x86_64", "aarch64")  # that a wheel has libraries for
GLIBC = "2.28"  # the oldest that they load with: Debian 10, Ubuntu 20.04, RHEL 8


@dataclass(frozen=True)
class OperatorInfo:
    """What a built library says of itself. `api`: the version of ONNX Runtime's table that it asks for."""

    path: Path
    machine: str
    api: int


def sources() -> list[Path]:
    """Everything that the library is compiled from."""
    return sorted(SOURCES.iterdir())


def source_sha256() -> str:
    """Hash of the sources and flags, which names a built library in the cache."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sources():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def build_operator(out_dir: Path, *, sanitize: bool = False, widest: int = 16) -> Path:
    """Compile the library and return its path, in `out_dir`. `sanitize` builds with ASan and UBSan, `widest` limits the floats of
    a vector: 16 (AVX-512), 8 (AVX2) or 4; a processor without them takes narrower ones by itself.

    Raises `MissingDependency` without a C++ compiler, `StepFailed` if compiling fails: the compiler's output is in
    `out_dir/build.log`.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise MissingDependency("a C++ compiler is not installed; run `apt-get install g++`")
    out_dir = Path(out_dir).resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    library = out_dir / LIBRARY
    files = [str(path) for path in sources() if path.suffix == ".cpp"]
    with atomic_file(library) as temporary:
        command = [compiler, *FLAGS, *(SANITIZE if sanitize else ()), f"-DMOEE_WIDEST={widest}", "-o", str(temporary), *files]
        run_logged(command, out_dir / "build.log", "the operator for ONNX Runtime")
    return library


def cross_build(out_dir: Path, machine: str) -> Path:
    """Compile the library for `machine`, one of `MACHINES`, by Zig's C++ compiler, and return its path, `out_dir/MACHINE/...`.

    Raises `MissingDependency` without the package ziglang, `StepFailed` if compiling fails.
    """
    if importlib.util.find_spec("ziglang") is None:
        raise MissingDependency("ziglang is not installed, which compiles for other processors; run `pip install ziglang`")
    folder = Path(out_dir).resolve() / machine
    folder.mkdir(parents=True, exist_ok=True)
    files = [str(path) for path in sources() if path.suffix == ".cpp"]
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", f"{machine}-linux-gnu.{GLIBC}"]
    with atomic_file(folder / LIBRARY) as temporary, tempfile.TemporaryDirectory() as scratch:
        kept = os.environ.get("ZIG_GLOBAL_CACHE_DIR", scratch)  # the C++ library, which takes most of the time
        caches = [f"ZIG_LOCAL_CACHE_DIR={scratch}", f"ZIG_GLOBAL_CACHE_DIR={kept}"]
        command = ["env", *caches, *zig, *FLAGS, "-s", "-o", str(temporary), *files]
        run_logged(command, folder / "build.log", f"the operator for {machine}")
    return folder / LIBRARY


def write_prebuilt(out_dir: Path) -> list[Path]:
    """Write a wheel's libraries into `out_dir`, with the hash of what they are made from; returns their paths."""
    libraries = [cross_build(out_dir, machine) for machine in MACHINES]
    (out_dir / HASH).write_text(source_sha256() + "\n", encoding="ascii")
    return libraries


def prebuilt() -> dict[str, Path]:
    """The libraries that came with this installation, by processor; none where its sources are others than theirs."""
    made_from = PREBUILT / HASH
    if not made_from.is_file() or made_from.read_text(encoding="ascii").strip() != source_sha256():
        return {}
    return {machine: PREBUILT / machine / LIBRARY for machine in MACHINES if (PREBUILT / machine / LIBRARY).is_file()}


def describe_operator(path: Path) -> OperatorInfo:
    """Read what `path` was built for, without loading it.

    Raises `UserError` if it is missing, no operator library of this project, or for another processor.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"operator library {path} cannot be read ({error.strerror})") from error
    match = re.search(rb"moee-onnxruntime-api=(\d+)", data)
    if data[:4] != b"\x7fELF" or match is None:
        raise UserError(f"{path} is no operator library for ONNX Runtime; expected {LIBRARY}")
    if (machine := elf_machine(data)) != platform.machine():
        raise UserError(f"{path} was built for {machine}, this machine is {platform.machine()}; build it here")
    return OperatorInfo(path, machine, int(match.group(1)))
