"""`kernels.json`, schema `moee.kernels/1`: what the ahead-of-time build hands to the C++ plugin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator

from moee.errors import UserError
from moee.schema import Body, checked, parse_json, upgraded
from plugins.contract import DTYPES
from plugins.kernels.spec import AXES, POINTERS, SCALARS

SCHEMA = "moee.kernels/1"
FILE_NAME = "kernels.json"
SCRATCH = ("global_scratch", "profile_scratch")
ARGUMENT_BYTES = {"ptr": 8, "scratch_ptr": 8, "i32": 4}
NAMES = {"ptr": POINTERS, "i32": SCALARS, "scratch_ptr": SCRATCH}
MAX_ARGUMENTS = 32  # csrc/cuda/launch.cpp


def one_of(*names: str) -> Callable[[str], str]:
    """A validator that lets only these through."""

    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return value

    return check


def file_name(value: str) -> str:
    """The value, if it is a name without a folder. Raises `ValueError` for a path."""
    if Path(value).name != value:
        raise ValueError("expected a plain file name")
    return value


# What goes into C++ source is a name of these tables, a number, or text that needs no escape there.
Name = Annotated[str, StringConstraints(max_length=200, pattern=r"^[ !#-\[\]-~]*$")]
FileName = Annotated[Name, AfterValidator(file_name)]
Size = Annotated[int, Field(ge=0, le=2**31 - 1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]  # what is divided by, or counts
Listed = Field(strict=False)  # JSON has lists, not tuples


class Entry(Body):
    model_config = ConfigDict(frozen=True)


class Argument(Entry):
    """One kernel argument; `scratch_ptr` is passed as null."""

    name: str
    type: Literal["ptr", "i32", "scratch_ptr"]

    @model_validator(mode="after")
    def _known(self) -> Argument:
        if self.name not in NAMES[self.type]:
            raise ValueError(f"argument {self.name!r} of type {self.type!r} is unknown")
        return self


class Block(Entry):
    """Tile of one program, as `plugins.kernels.spec.Block`."""

    m: Count
    n: Count
    k: Size


class Kernel(Entry):
    """One compiled kernel. Sizes in bytes, `grid` names of spec.AXES, `args` in launch order. In the builder's cache, dtype "any"
    stands for a kernel that never touches T."""

    role: Name
    variant: Name
    dtype: Annotated[str, AfterValidator(one_of(*DTYPES, "any"))]
    sm: Count
    symbol: Name
    cubin: FileName
    ptx: FileName
    sha256: Name
    num_warps: int = Field(ge=1, le=32)
    shared_bytes: Size
    registers: Size
    spill_bytes: Size
    stack_bytes: Size
    mma_count: Size
    cp_async_count: Size
    ptx_version: Size
    block: Block
    grid: Annotated[tuple[Annotated[str, AfterValidator(one_of(*AXES))], ...], Listed, Field(min_length=3, max_length=3)]
    args: Annotated[tuple[Argument, ...], Listed, Field(max_length=MAX_ARGUMENTS)]
    constants: dict[str, int] = {}


class Step(Entry):
    """One launch of a tactic."""

    role: Name
    variant: Name


class TacticEntry(Entry):
    """One tactic: `launches` in order."""

    id: Count
    name: Name
    top_k: Literal["any", "one"]
    max_d: Size
    max_tokens: Size
    launches: Annotated[tuple[Step, ...], Listed, Field(min_length=1)]


class Manifest(Entry):
    """The whole file. `folder` is where it was loaded from; it is not part of the JSON."""

    source_sha256: Name
    triton: str
    ptxas: str
    tactics: Annotated[tuple[TacticEntry, ...], Listed]
    kernels: Annotated[tuple[Kernel, ...], Listed]
    folder: Path | None = Field(default=None, exclude=True)

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

    def select(self, sms: Iterable[int] | None) -> tuple[int, ...]:
        """The wanted SMs, ascending (None: all). Raises `UserError` for one that there are no kernels for."""
        wanted = self.sms if sms is None else tuple(sorted(set(sms)))
        unknown = [sm for sm in wanted if sm not in self.sms]
        if unknown or not wanted:
            names = ", ".join(f"sm_{sm}" for sm in unknown) or "any SM"
            have = ", ".join(f"sm_{sm}" for sm in self.sms) or "none"
            raise UserError(f"no kernels for {names}; built are: {have}; pass one of these or build the missing ones")
        return wanted

    def to_json(self) -> str:
        """Text of `kernels.json`, stable for equal content."""
        return json.dumps({"schema": SCHEMA, **self.model_dump()}, indent=1) + "\n"

    @model_validator(mode="after")
    def _whole(self) -> Manifest:
        """Every tactic has its kernels, for every SM and type that there are kernels for."""
        ids = [t.id for t in self.tactics]
        if not ids or len(set(ids)) != len(ids):
            raise ValueError(f"tactic ids must be positive and unique, got {ids}")
        keys = {(k.role, k.variant, k.dtype, k.sm) for k in self.kernels}
        if len(keys) != len(self.kernels) or any(k.dtype == "any" for k in self.kernels):
            raise ValueError("a kernel is listed twice, or without its type")
        steps = [(t.name, step) for t in self.tactics for step in t.launches]
        for sm, dtype in {(k.sm, k.dtype) for k in self.kernels}:
            for name, step in steps:
                for role in (step.role, "route_load") if step.role == "route" else (step.role,):
                    if (role, step.variant, dtype, sm) not in keys:
                        raise ValueError(f"tactic {name} needs {role}/{step.variant} for {dtype}, sm_{sm}, which is not listed")
        return self


def load(path: str | Path, verify_files: bool = True) -> Manifest:
    """Read and check `kernels.json` (a file, or the folder it is in).

    Raises `UserError` if the file is missing or broken, names an unknown argument, grid axis or launch, or if a cubin's hash
    differs.
    """
    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    try:
        body = parse_json(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file} not found; build the kernels first (`moee plugin build`)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable JSON ({error}); build the kernels again") from None
    manifest = parse(body, file).model_copy(update={"folder": file.parent})
    if verify_files:
        for kernel in manifest.kernels:
            _check_files(kernel, file.parent)
    return manifest


def parse(body: Any, where: Path = Path(FILE_NAME)) -> Manifest:
    """From decoded JSON; `UserError` as in `load`, files are not looked at."""
    body = upgraded(body, SCHEMA, where)
    del body["schema"]
    return checked(Manifest, body, where)


def _check_files(kernel: Kernel, folder: Path) -> None:
    for name in (kernel.cubin, kernel.ptx):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing, but {FILE_NAME} names it; build the kernels again")
    came = hashlib.sha256((folder / kernel.cubin).read_bytes()).hexdigest()
    if came != kernel.sha256:
        raise UserError(
            f"{folder / kernel.cubin} has sha256 {came[:12]}…, {FILE_NAME} says {kernel.sha256[:12]}…; build the kernels again"
        )
