"""Kernel manifest to C++: `tables.cpp`, `modules.cpp` and `kernels.bin`, which the plugin compiles in.

The blob holds each module once and as it is, where the driver reads it. `modules.cpp` includes it with the assembler's
`.incbin`, so a 40 MB blob costs the compiler nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from plugins.aot import manifest
from plugins.devices import HOW, parse_sms
from plugins.library import tables

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
    Raises `UserError` for kernels that `manifest.load` refuses, or an SM that they lack.
    """
    kernels_dir, out_dir = Path(kernels_dir), Path(out_dir)
    kernels = manifest.load(kernels_dir)
    chosen = kernels.select(sms)
    base = ptx_base(chosen) if ptx else None
    modules = Modules()
    arguments: dict[tuple[str, ...], str] = {}
    rows = []
    for kernel in kernels.kernels:
        if kernel.sm not in chosen:
            continue
        for is_ptx, name in [(False, kernel.cubin)] + ([(True, kernel.ptx)] if kernel.sm == base else []):
            module = modules.add(name, (kernels_dir / name).read_bytes())
            rows.append(tables.kernel_row(kernel, is_ptx, module, arguments))
    tactics, launches = tables.tactic_rows(kernels.tactics)
    out_dir.mkdir(parents=True, exist_ok=True)
    text = tables.TABLES.format(
        arguments="\n".join(f"constexpr Arg {name}[] = {{{', '.join(args)}}};" for args, name in arguments.items()),
        kernels="\n".join(rows),
        launches="\n".join(launches),
        tactics="\n".join(tactics),
        tactic_count=len(tactics),
        kernel_count=len(rows),
        source=f'"{kernels.source_sha256}"',
    )
    blob, entries = _blob([content for _, content in modules.files])
    _write(out_dir / "kernels.bin", blob)
    _write(out_dir / "modules.cpp", tables.MODULES.format(entries="\n".join(entries)).encode())
    _write(out_dir / "tables.cpp", text.encode())
    size = sum(len(content) for _, content in modules.files)
    files = tuple(name for name, _ in modules.files)
    return Embedded(chosen, files, size)


def _blob(contents: Sequence[bytes]) -> tuple[bytes, list[str]]:
    """The modules behind one another as `csrc/operator/tables.h` wants them, and each one's line of `modules.cpp`."""
    blob, entries = bytearray(), []
    for content in contents:
        entries.append(f"        moee_blob + {len(blob)},")
        blob += content
        blob += bytes(ALIGNMENT - len(blob) % ALIGNMENT)  # at least one: PTX is text, which the driver reads up to a zero
    return bytes(blob), entries


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
