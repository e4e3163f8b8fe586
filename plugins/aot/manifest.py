"""`kernels.json`, schema `moee.kernels/1`: what the ahead-of-time build hands to the C++ plugin."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from plugins.contract import DTYPES
from plugins.kernels.spec import AXES, POINTERS, SCALARS

SCHEMA = "moee.kernels/1"
FILE_NAME = "kernels.json"
SCRATCH = ("global_scratch", "profile_scratch")
ARGUMENT_BYTES = {"ptr": 8, "scratch_ptr": 8, "i32": 4}


@dataclass(frozen=True)
class Argument:
    """One kernel argument; `type` is ptr, i32, or scratch_ptr (passed as null)."""

    name: str
    type: str


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel. Sizes in bytes, `grid` names of spec.AXES, `args` in launch order."""

    role: str
    variant: str
    dtype: str
    sm: int
    symbol: str
    cubin: str
    ptx: str
    sha256: str
    num_warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    mma_count: int
    cp_async_count: int
    ptx_version: int
    block: dict[str, int]
    grid: tuple[str, ...]
    args: tuple[Argument, ...]
    constants: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TacticEntry:
    """One tactic: `launches` are (role, variant) in order."""

    id: int
    name: str
    top_k: str
    max_d: int
    max_tokens: int
    launches: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Manifest:
    """The whole file. `folder` is where it was loaded from; it is not part of the JSON."""

    source_sha256: str
    triton: str
    ptxas: str
    tactics: tuple[TacticEntry, ...]
    kernels: tuple[Kernel, ...]
    schema: str = SCHEMA
    folder: Path | None = None

    @property
    def sms(self) -> tuple[int, ...]:
        """Architectures in the folder, ascending."""
        return tuple(sorted({k.sm for k in self.kernels}))

    def find(self, role: str, variant: str, dtype: str, sm: int) -> Kernel:
        """The kernel with that key; ValueError if it is not there."""
        for k in self.kernels:
            if (k.role, k.variant, k.dtype, k.sm) == (role, variant, dtype, sm):
                return k
        raise ValueError(f"no kernel {role}/{variant} for {dtype}, sm_{sm} in the manifest; it holds sm {self.sms}")

    def to_json(self) -> str:
        """Text of `kernels.json`, stable for equal content."""
        data = asdict(self)
        del data["folder"]
        return json.dumps({"schema": data.pop("schema"), **data}, indent=1) + "\n"


def load(path: str | Path, verify_files: bool = True) -> Manifest:
    """Read and check `kernels.json` (a file, or the folder it is in).

    Raises ValueError, one sentence, if the file is missing or broken, names an unknown argument, grid axis or launch,
    or if a cubin's hash differs.
    """
    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; build the kernels first with `python -m plugins.aot`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); build the kernels again") from None
    manifest = parse(data, str(file))
    manifest = Manifest(**{**vars(manifest), "folder": file.parent})
    if verify_files:
        for kernel in manifest.kernels:
            _check_files(kernel, file.parent)
    return manifest


def parse(data: Any, where: str = FILE_NAME) -> Manifest:
    """From decoded JSON; ValueError as in `load`, files are not looked at."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{where}: expected schema {SCHEMA!r}, got {found!r}; build the kernels again")
    try:
        tactics = tuple(TacticEntry(**{**t, "launches": tuple(t["launches"])}) for t in data["tactics"])
        kernels = tuple(
            Kernel(**{**k, "grid": tuple(k["grid"]), "args": tuple(Argument(**a) for a in k["args"])})
            for k in data["kernels"]
        )
        manifest = Manifest(data["source_sha256"], data["triton"], data["ptxas"], tactics, kernels)
        problem = _problem(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: a field is missing or unknown ({error}); build the kernels again") from None
    if problem:
        raise ValueError(f"{where}: {problem}; build the kernels again")
    return manifest


def _problem(manifest: Manifest) -> str | None:
    ids = [t.id for t in manifest.tactics]
    if not ids or len(set(ids)) != len(ids) or min(ids) <= 0:
        return f"tactic ids must be positive and unique, got {ids}"
    keys = {(k.role, k.variant, k.dtype, k.sm) for k in manifest.kernels}
    if len(keys) != len(manifest.kernels):
        return "a kernel is listed twice"
    for k in manifest.kernels:
        name = f"{k.role}/{k.variant}/{k.dtype}/sm_{k.sm}"
        if k.dtype not in DTYPES:
            return f"{name}: dtype must be one of {DTYPES}"
        if len(k.grid) != 3 or any(axis not in AXES for axis in k.grid):
            return f"{name}: grid must be three of {sorted(AXES)}, got {list(k.grid)}"
        if set(k.block) != {"m", "n", "k"} or k.block["m"] <= 0 or k.block["n"] <= 0:
            return f"{name}: block must hold m, n, k with m and n positive, got {k.block}"
        for a in k.args:
            known = POINTERS if a.type == "ptr" else SCALARS if a.type == "i32" else SCRATCH
            if a.type not in ARGUMENT_BYTES or a.name not in known:
                return f"{name}: argument {a.name!r} of type {a.type!r} is unknown"
        if Path(k.cubin).name != k.cubin or Path(k.ptx).name != k.ptx:
            return f"{name}: cubin and ptx must be plain file names"
    for sm, dtype in {(k.sm, k.dtype) for k in manifest.kernels}:
        for t in manifest.tactics:
            for step in t.launches:
                roles = (step["role"], "route_load") if step["role"] == "route" else (step["role"],)
                for role in roles:
                    if (role, step["variant"], dtype, sm) not in keys:
                        return (
                            f"tactic {t.name} needs {role}/{step['variant']} for {dtype}, sm_{sm}, which is not listed"
                        )
    return None


def _check_files(kernel: Kernel, folder: Path) -> None:
    for name in (kernel.cubin, kernel.ptx):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} does not exist, but {FILE_NAME} names it; build the kernels again")
    found = hashlib.sha256((folder / kernel.cubin).read_bytes()).hexdigest()
    if found != kernel.sha256:
        raise ValueError(
            f"{folder / kernel.cubin} has sha256 {found[:12]}…, {FILE_NAME} says {kernel.sha256[:12]}…; build again"
        )
