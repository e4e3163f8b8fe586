"""Kernel manifest to C++: `tables.cpp`, `modules.cpp` and `kernels.bin`, which the plugin compiles in.

The blob holds each module once and as it is, where the driver reads it. `modules.cpp` includes it with the assembler's
`.incbin`, so a 40 MB blob costs the compiler nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moee.errors import UserError
from moee.schema import checked, parse_json, shown
from plugins.devices import HOW, parse_sms
from plugins.library import tables
from plugins.library.kernel_schema import Kernels

SCHEMA = "moee.kernels/1"
ALIGNMENT = 16  # bytes; a cubin is an ELF file, whose fields are read in place


@dataclass
class Modules:
    """Cubin and PTX files in the order of first use, each distinct content once: name and content."""

    files: list[tuple[str, bytes]] = field(default_factory=list)
    index: dict[bytes, int] = field(default_factory=dict)

    def add(self, name: str, content: bytes) -> int:
        """Index of `content`."""
        if content not in self.index:
            self.index[content] = len(self.files)
            self.files.append((name, content))
        return self.index[content]


@dataclass(frozen=True)
class Embedded:
    """What went into the tables. `files` are the names of the embedded modules, by index; `module_bytes` is their sum."""

    sms: tuple[int, ...]
    files: tuple[str, ...]
    module_bytes: int
    source_sha256: str


def read_kernels(kernels_dir: Path) -> dict[str, Any]:
    """The manifest of a kernel folder. Raises `UserError` if it is missing or has another schema."""
    path = Path(kernels_dir) / "kernels.json"
    try:
        manifest = parse_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} not found; build the kernels first (`moee plugin build`)") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); build the kernels again") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        came = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise UserError(f"{path} has schema {shown(came)}, expected {SCHEMA!r}; build the kernels again")
    checked(Kernels, manifest, path)
    return manifest


def available_sms(manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """SMs that the manifest holds kernels for, ascending."""
    return tuple(sorted({int(kernel["sm"]) for kernel in manifest["kernels"]}))


def select_sms(manifest: Mapping[str, Any], sms: Iterable[int] | None) -> tuple[int, ...]:
    """The wanted SMs (None: all). Raises `UserError` for one that the manifest lacks."""
    available = available_sms(manifest)
    wanted = available if sms is None else tuple(sorted(set(sms)))
    unknown = [sm for sm in wanted if sm not in available]
    if unknown or not wanted:
        names = ", ".join(f"sm_{sm}" for sm in unknown) or "any SM"
        have = ", ".join(f"sm_{sm}" for sm in available) or "none"
        raise UserError(f"no kernels for {names}; built are: {have}; pass one of these or build the missing ones")
    return wanted


def ptx_base(sms: Sequence[int]) -> int | None:
    """The SM whose PTX goes in for the driver's own compiler: the lowest portable one, for later devices too.

    From sm_90 on the kernels use features of one architecture, so their PTX helps only that one: it goes in if it is
    the only SM, for a driver that refuses the cubins.
    """
    portable = [sm for sm in sms if sm < 90]
    return min(portable) if portable else sms[0] if len(sms) == 1 else None


def embed(kernels_dir: Path, out_dir: Path, sms: Iterable[int] | None = None, ptx: bool = True) -> Embedded:
    """Write `tables.cpp`, `modules.cpp` and `kernels.bin` for `sms` (None: all) to `out_dir`.

    `ptx` also embeds the PTX of the lowest portable SM, so that a device without a cubin can compile it.
    Raises `UserError` for a missing or foreign manifest, an unknown SM, argument, axis or type, or a missing file.
    """
    kernels_dir, out_dir = Path(kernels_dir), Path(out_dir)
    manifest = read_kernels(kernels_dir)
    chosen = select_sms(manifest, sms)
    base = ptx_base(chosen) if ptx else None
    modules = Modules()
    arguments: dict[tuple[str, ...], str] = {}
    rows = []
    for kernel in manifest["kernels"]:
        if int(kernel["sm"]) not in chosen:
            continue
        for is_ptx, name in [(False, kernel["cubin"])] + ([(True, kernel["ptx"])] if int(kernel["sm"]) == base else []):
            module = modules.add(name, _module(kernels_dir, name, None if is_ptx else kernel["sha256"]))
            rows.append(tables.kernel_row(kernel, is_ptx, module, arguments))
    tactics, launches = tables.tactic_rows(manifest)
    out_dir.mkdir(parents=True, exist_ok=True)
    text = tables.TABLES.format(
        arguments="\n".join(f"constexpr Arg {name}[] = {{{', '.join(args)}}};" for args, name in arguments.items()),
        kernels="\n".join(rows),
        launches="\n".join(launches),
        tactics="\n".join(tactics),
        tactic_count=len(tactics),
        kernel_count=len(rows),
        source=tables.text_literal(str(manifest["source_sha256"])),
    )
    blob, entries = _blob([content for _, content in modules.files])
    _write(out_dir / "kernels.bin", blob)
    _write(out_dir / "modules.cpp", tables.MODULES.format(entries="\n".join(entries)).encode())
    _write(out_dir / "tables.cpp", text.encode())
    size = sum(len(content) for _, content in modules.files)
    files = tuple(name for name, _ in modules.files)
    return Embedded(chosen, files, size, str(manifest["source_sha256"]))


def _blob(contents: Sequence[bytes]) -> tuple[bytes, list[str]]:
    """The modules behind one another as `csrc/operator/tables.h` wants them, and each one's line of `modules.cpp`."""
    blob, entries = bytearray(), []
    for content in contents:
        entries.append(f"        moee_blob + {len(blob)},")
        blob += content
        blob += bytes(ALIGNMENT - len(blob) % ALIGNMENT)  # at least one: PTX is text, which the driver reads up to a zero
    return bytes(blob), entries


def _module(folder: Path, name: str, expected: str | None) -> bytes:
    """The file; a cubin's hash is in the manifest. Raises `UserError`."""
    path = folder / name
    if Path(name).name != name:
        raise UserError(f"kernels.json names {name!r}, which leaves its folder; do not use this kernel folder")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} is missing ({error.strerror}); build the kernels again") from error
    if expected is not None and hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"{path} does not match its hash in kernels.json; build the kernels again")
    return content


def _write(path: Path, data: bytes) -> None:
    """Write only what changed, so that a rebuild compiles nothing."""
    if not path.exists() or path.read_bytes() != data:
        path.write_bytes(data)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m plugins.library.embed --kernels DIR --out DIR --sm 87`: what CMake runs for -DMOEE_SM."""
    parser = argparse.ArgumentParser(description="Write the plugin's tables from a folder of compiled kernels.")
    parser.add_argument("--kernels", type=Path, required=True, help="folder with kernels.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sm", required=True, help=f"devices, separated by commas: {HOW}, or all")
    args = parser.parse_args(arguments)
    try:
        embed(args.kernels, args.out, parse_sms(args.sm))
    except ValueError as error:
        print(f"plugins.library.embed: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
