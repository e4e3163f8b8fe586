"""Look into a cubin with the disassemblers that Triton bundles: parameter table and instruction counts."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Tensor-core products by generation: HMMA (sm_80 to 89, 120, 121), HGMMA (sm_90), UTCHMMA (sm_100 to 110).
MMA = re.compile(r"\b(?:HMMA|HGMMA|UTCHMMA)\b")
CP_ASYNC = re.compile(r"\bLDGSTS\b")


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter in the cubin's own table: position, byte offset and size."""

    ordinal: int
    offset: int
    size: int


@dataclass(frozen=True)
class Instructions:
    """How many instructions of each kind the binary holds."""

    mma: int
    cp_async: int


def tool(name: str) -> str:
    """Path of a CUDA tool in the installed Triton wheel; FileNotFoundError if it has none."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"Triton's wheel should bundle {name}; {path} does not exist. Reinstall triton.")
    return str(path)


def parse_parameters(listing: str) -> list[Parameter]:
    """Parameters from the text of `cuobjdump -elf`, in order.

    An entry reads `Attribute: EIATTR_KPARAM_INFO ... Ordinal : 0x3 Offset : 0x18 Size : 0x8`.
    """
    pattern = re.compile(
        r"EIATTR_KPARAM_INFO\b.*?Ordinal\s*:\s*(0x\w+)\s+Offset\s*:\s*(0x\w+)\s+Size\s*:\s*(0x\w+)", re.S
    )
    found = {int(o, 16): Parameter(int(o, 16), int(at, 16), int(size, 16)) for o, at, size in pattern.findall(listing)}
    return [found[o] for o in sorted(found)]


def parameters(path: Path) -> list[Parameter]:
    """Parameter table of the one kernel in the cubin at `path`."""
    return parse_parameters(_run("cuobjdump", "-elf", str(path)))


def instructions(path: Path) -> Instructions:
    """Count tensor-core and asynchronous-copy instructions in the cubin at `path`."""
    listing = _run("cuobjdump", "-sass", str(path))
    return Instructions(len(MMA.findall(listing)), len(CP_ASYNC.findall(listing)))


def _run(name: str, *arguments: str) -> str:
    result = subprocess.run([tool(name), *arguments], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"{name} failed on {arguments[-1]}: {result.stderr.strip()[:500]}")
    return result.stdout
