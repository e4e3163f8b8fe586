"""Compiles the TensorRT plugin with cmake and the system's C++ compiler. No nvcc, no TensorRT library.

Header search order: `TENSORRT_ROOT`, the system's include folders, the `kernel-lens` wheel (tests and CI).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moee.errors import MissingDependency, StepFailed, UserError
from moee.parallel.machine import usable_cpus
from moee.store.atomic import atomic_file
from plugins.library.embed import embed

LIBRARY = "libmoee_plugin.so"
SOURCE = Path(__file__).resolve().parent.parent  # CMakeLists.txt and csrc
SYSTEM_INCLUDES = (
    f"/usr/include/{platform.machine()}-linux-gnu",
    "/usr/include",
    "/usr/local/include",
    "/usr/local/tensorrt/include",
    "/opt/tensorrt/include",
)
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
SUPPORTED_MAJORS = (10, 11)  # IPluginV3's binary interface is the same in both


@dataclass(frozen=True)
class Headers:
    """A folder with NvInferRuntime.h and the version that its NvInferVersion.h states."""

    include: Path
    version: str

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


@dataclass(frozen=True)
class PluginInfo:
    """What a built plugin library says of itself. `headers` is the TensorRT version, major.minor."""

    path: Path
    machine: str
    headers: str


def header_candidates() -> list[Path]:
    """Folders that may hold TensorRT's headers, in search order."""
    found = []
    if root := os.environ.get("TENSORRT_ROOT"):
        found += [Path(root) / "include", Path(root)]
    found += [Path(folder) for folder in SYSTEM_INCLUDES]
    spec = importlib.util.find_spec("kernel_lens")
    if spec is not None and spec.origin:
        found.append(Path(spec.origin).parent / "include" / "tensorrt")
    return found


def find_headers() -> list[Headers]:
    """Every header set found, in search order."""
    return [Headers(f, _version(f)) for f in header_candidates() if (f / "NvInferRuntime.h").is_file()]


def _version(include: Path) -> str:
    text = (include / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    parts = []
    for level in ("MAJOR", "MINOR", "PATCH"):
        value = f"NV_TENSORRT_{level}"
        for _ in range(3):  # from 10.13 on the value is a second macro
            match = re.search(rf"^#define\s+{value}\s+(\w+)", text, re.MULTILINE)
            value = match.group(1) if match else "0"
            if value.isdigit():
                break
        parts.append(value)
    return ".".join(parts)


def select_headers(tensorrt_root: Path | None = None) -> Headers:
    """The header set to build with. Raises `MissingDependency` if there is none, `UserError` for TensorRT before 10."""
    if tensorrt_root is not None:
        folders = [f for f in (tensorrt_root / "include", tensorrt_root) if (f / "NvInferRuntime.h").is_file()]
        if not folders:
            raise UserError(f"no NvInferRuntime.h in {tensorrt_root} or its include folder; point it at a TensorRT")
        headers = Headers(folders[0], _version(folders[0]))
    else:
        found = find_headers()
        if not found:
            raise MissingDependency(
                "TensorRT's headers were not found; set TENSORRT_ROOT, install libnvinfer-headers-dev, or "
                "`pip install kernel-lens==2.0.1`"
            )
        headers = found[0]
    if headers.major not in SUPPORTED_MAJORS:
        raise UserError(f"{headers.include} holds TensorRT {headers.version}'s headers; the plugin needs 10.0 to 11.x")
    return headers


def build_plugin(
    out_dir: Path,
    kernels_dir: Path,
    sms: Iterable[int] | None = None,
    *,
    ptx: bool = True,
    tensorrt_root: Path | None = None,
    sanitize: bool = False,
    host: Sequence[Path] = (),
    jobs: int | None = None,
) -> Path:
    """Compile the plugin with the kernels in `kernels_dir` and return the library's path, in `out_dir`.

    `sms` limits the embedded SMs (None: all). `sanitize` builds with ASan and UBSan; `host` names the C++ sources of
    a test program, built as `out_dir/build/moee_host`. Raises `MissingDependency` without cmake, a compiler or headers,
    `UserError` for unusable kernels or headers, `StepFailed` if compiling fails: the compiler's output is in `out_dir/build.log`.
    """
    out_dir = Path(out_dir).resolve()
    headers = select_headers(tensorrt_root)
    cmake = find_cmake()
    for tool, package in ((cmake, "cmake"), (shutil.which("c++"), "g++")):
        if tool is None:
            raise MissingDependency(f"{package} is not installed; run `apt-get install {package}`")
    tables = out_dir / "generated"
    embed(kernels_dir, tables, sms, ptx)
    build = out_dir / "build"
    configure = [
        *(str(cmake), "-S", str(SOURCE), "-B", str(build)),
        f"-DMOEE_TABLES={tables}",
        f"-DTENSORRT_INCLUDE={headers.include}",
        f"-DMOEE_SANITIZE={'ON' if sanitize else 'OFF'}",
        f"-DMOEE_HOST={';'.join(str(Path(source).resolve()) for source in host)}",
    ]
    run_logged(configure, out_dir / "build.log")
    run_logged([str(cmake), "--build", str(build), "-j", str(jobs or usable_cpus())], out_dir / "build.log")
    library = out_dir / LIBRARY
    with atomic_file(library) as temporary:
        shutil.copy2(build / LIBRARY, temporary)
    return library


def find_cmake() -> str | None:
    """CMake on the search path, or the one that pip put beside this Python."""
    beside = Path(sys.executable).parent / "cmake"
    return shutil.which("cmake") or (str(beside) if beside.is_file() else None)


def run_logged(command: list[str], log: Path, what: str = "the plugin") -> None:
    """Run a command that compiles `what`; its output goes to `log`. Raises `StepFailed` with the first line that speaks of an
    error."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    log.write_text(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}", encoding="utf-8")
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "it said nothing")
        raise StepFailed(f"compiling {what} failed: {first[:300]} (all of the output is in {log})")


def elf_machine(data: bytes) -> str:
    """The processor, as `platform.machine` calls it, that the library with these bytes is for."""
    code = struct.unpack_from("<H", data, 18)[0]
    return next((name for name, value in ELF_MACHINES.items() if value == code), f"ELF machine {code}")


def describe_plugin(path: Path) -> PluginInfo:
    """Read what `path` was built for, without loading it.

    Raises `UserError` if it is missing, no plugin of this project, for another processor, or for another TensorRT.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"plugin library {path} cannot be read ({error.strerror}); run `make plugin`") from error
    match = re.search(rb"moee-plugin-headers=(\d+)\.(\d+)", data)
    if data[:4] != b"\x7fELF" or match is None:
        raise UserError(f"{path} is not a MoeeFfn plugin library; expected {LIBRARY}, which `make plugin` writes")
    if (machine := elf_machine(data)) != platform.machine():
        raise UserError(f"{path} was built for {machine}, this machine is {platform.machine()}; run `make plugin` here")
    headers = f"{int(match.group(1))}.{int(match.group(2))}"
    if int(match.group(1)) not in SUPPORTED_MAJORS:
        raise UserError(f"{path} was built with TensorRT {headers}'s headers; build it with those of 10.0 to 11.x")
    return PluginInfo(path, machine, headers)
