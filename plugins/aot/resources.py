"""The resource table of a kernel build, as Markdown: registers, shared memory, occupancy, instruction counts; then the account.

python -m plugins.aot.resources build/kernels > docs/results/kernels.md
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from plugins import account
from plugins.aot import manifest
from plugins.aot.manifest import Kernel, Manifest
from plugins.targets import occupancy, target

HEADER = """# Kernel resources

Made by `python -m plugins.aot --out build/kernels && python -m plugins.aot.resources build/kernels`, on a CPU: the figures
come from ptxas and from the disassembled binaries, nothing here was run on a GPU. Triton {triton}, ptxas {ptxas}.

- *registers* a thread; *shared* dynamic bytes a block; *spills* and *stack* in bytes (both 0, or the build fails).
- *blocks* that fit on one multiprocessor at once, and the share of its *warps* that they fill, from the limits in
  `plugins/targets.py` (CUDA C++ Programming Guide): modelled, not measured.
- *mma*: tensor-core instructions in the binary (HMMA; HGMMA on sm_90; UTCHMMA on sm_100 to sm_110). float32 uses none:
  its products are exact IEEE. *cp.async*: asynchronous copies to shared memory.

{count} kernels, {files} different binaries, {mib:.1f} MiB of cubins.
"""

DRIVERS = """## What each driver takes

A cubin loads on a driver of the CUDA major version whose ptxas made it, or newer (NVIDIA's minor-version
compatibility); PTX loads only where its ISA version is known. `plugins/targets.py` therefore takes the older of
Triton's two ptxas wherever it can, and the lowest ISA version that assembles:

| SM | boards | ptxas | PTX ISA | cubins load from | PTX loads from |
|---|---|---|---|---|---|
{rows}

ISA 7.8 is the floor for sm_75 to sm_89 because Triton's code writes `shared::cta`; 7.4, where sm_87 begins, is rejected
by ptxas for that. JetPack 6 ships CUDA 12.2 or newer, so both its cubins and its PTX load; JetPack 7 ships CUDA 13.0.
The ELF header's ABI version is 7 for cubins up to sm_90 and 8 from sm_100 on, with either ptxas. Only documented rules
and the headers were checked: no driver was at hand.
"""
ISA_DRIVERS = {78: "11.8", 80: "12.0", 86: "12.7", 87: "12.8", 88: "12.9", 90: "13.0"}
# First CUDA whose driver knows the architecture, where that is later than the ptxas major version's first driver.
FIRST_DRIVER = {100: "12.8", 103: "12.9", 110: "13.0", 120: "12.8", 121: "12.9"}


def row(k: Kernel) -> str:
    """One table row."""
    blocks = occupancy(k.sm, k.registers, k.shared_bytes, k.num_warps)
    warps = 100 * blocks * k.num_warps // target(k.sm).max_warps
    return (
        f"| {k.role} {k.variant} | {k.dtype} | {k.num_warps} | {k.registers} | {k.shared_bytes} | "
        f"{k.spill_bytes}/{k.stack_bytes} | {blocks} ({warps} %) | {k.mma_count} | {k.cp_async_count} |"
    )


def table(build: Manifest) -> str:
    """The whole document; `build` must come from `manifest.load`, so that file sizes can be read. Raises `ValueError`
    for another."""
    if build.folder is None:
        raise ValueError("the manifest has no folder; read it with plugins.aot.manifest.load")
    files = {k.cubin for k in build.kernels}
    size = sum((build.folder / f).stat().st_size for f in files)
    parts = [
        HEADER.format(
            triton=build.triton, ptxas=build.ptxas, count=len(build.kernels), files=len(files), mib=size / 2**20
        )
    ]
    rows = []
    for sm in build.sms:
        t = target(sm)
        version = "13.0" if t.ptxas != "ptxas" else FIRST_DRIVER.get(sm, "12.0")
        isa = f"{t.ptx_version // 10}.{t.ptx_version % 10}"
        rows.append(f"| {sm} | {t.boards} | {t.ptxas} | {isa} | CUDA {version} | CUDA {ISA_DRIVERS[t.ptx_version]} |")
    parts.append(DRIVERS.format(rows="\n".join(rows)))
    for sm in build.sms:
        t = target(sm)
        parts.append(f"## sm_{sm} ({t.boards}), at most {t.shared_block // 1024} KiB of shared memory a block\n")
        parts.append("| kernel | dtype | warps | registers | shared | spills/stack | blocks (warps) | mma | cp.async |")
        parts.append("|---|---|---|---|---|---|---|---|---|")
        parts += [row(k) for k in build.kernels if k.sm == sm]
        parts.append("")
    return "\n".join([*parts, account.text(build)])


def main(arguments: Sequence[str]) -> int:
    """Print the table for the build folder given; exit code 2 for bad input."""
    if len(arguments) != 1:
        print("usage: python -m plugins.aot.resources FOLDER", file=sys.stderr)
        return 2
    try:
        print(table(manifest.load(arguments[0])))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
