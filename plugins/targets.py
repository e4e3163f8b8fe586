"""The GPU architectures the kernels are built for: compiler, PTX version, limits of one multiprocessor.

Two things decide whether a driver takes a binary. A cubin loads on any driver of the CUDA major version whose ptxas
made it, or newer (NVIDIA's minor-version compatibility). PTX loads only on a driver that knows its ISA version. So each
target names the oldest ptxas that can make it and the lowest ISA version its code needs:

- Triton 3.8 writes `shared::cta`, which needs ISA 7.8 (CUDA 11.8); that is the floor for sm_75 to sm_89. JetPack 6
  (sm_87) ships CUDA 12.2 or newer, which takes ISA 8.2.
- The `a` targets need the version that introduced them: 90a 8.0, 100a 8.6, 120a 8.7, 103a and 121a 8.8, 110a 9.0.
- Triton bundles ptxas 12.9 and 13.3 and would use 13.3 from sm_100 on. Its cubins need a CUDA 13 driver, although
  12.8 drivers run sm_100 and sm_120; so only sm_110, which 12.9 does not know, gets 13.3 (JetPack 7 ships CUDA 13.0).

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Target:
    """One architecture. `shared_block` is the most dynamic shared memory a block may ask for, in bytes."""

    sm: int
    ptx_version: int
    ptxas: str
    shared_block: int
    shared_sm: int
    max_warps: int
    max_blocks: int
    boards: str
    tensor_cores: bool = True
    registers: int = 65536

    @property
    def arch(self) -> str:
        """Name for ptxas; from sm_90 on Triton's code is for exactly one architecture, hence the `a`."""
        return f"sm_{self.sm}{'a' if self.sm >= 90 else ''}"


OLD, NEW = "ptxas", "ptxas-blackwell"

# Triton 3.4 and later emit no tensor-core instruction for sm_75: it is unsupported. What `--sm 75` builds is right and slow.
TARGETS: dict[int, Target] = {
    t.sm: t
    for t in (
        Target(75, 78, OLD, 64 * KIB, 64 * KIB, 32, 16, "T4, RTX 20", tensor_cores=False),
        Target(80, 78, OLD, 163 * KIB, 164 * KIB, 64, 32, "A100"),
        Target(86, 78, OLD, 99 * KIB, 100 * KIB, 48, 16, "A10, RTX 30"),
        Target(87, 78, OLD, 163 * KIB, 164 * KIB, 48, 16, "Jetson Orin"),
        Target(89, 78, OLD, 99 * KIB, 100 * KIB, 48, 24, "L4, RTX 40"),
        Target(90, 80, OLD, 227 * KIB, 228 * KIB, 64, 32, "H100"),
        Target(100, 86, OLD, 227 * KIB, 228 * KIB, 64, 32, "B200"),
        Target(103, 88, OLD, 227 * KIB, 228 * KIB, 64, 32, "B300"),
        Target(110, 90, NEW, 227 * KIB, 228 * KIB, 48, 24, "Jetson Thor"),
        Target(120, 87, OLD, 99 * KIB, 100 * KIB, 48, 24, "RTX 50"),
        Target(121, 88, OLD, 99 * KIB, 100 * KIB, 48, 24, "DGX Spark"),
    )
}
DEFAULT_SMS: tuple[int, ...] = tuple(sm for sm, t in TARGETS.items() if t.tensor_cores)


def target(sm: int) -> Target:
    """Raises ValueError for an SM that is not in the table."""
    if sm not in TARGETS:
        raise ValueError(f"unknown SM {sm}; known are {', '.join(map(str, TARGETS))}")
    return TARGETS[sm]


def occupancy(sm: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Blocks of a kernel that fit on one multiprocessor at once.

    Registers are given out a warp in units of 256; each block also takes 1 KiB of shared memory for the system
    (sm_80 and later), and shared memory comes in units of 128 bytes (256 on sm_75).
    """
    t = target(sm)
    unit, reserved = (256, 0) if sm < 80 else (128, KIB)
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = t.registers // (warp_registers * num_warps) if registers else t.max_blocks
    shared = -(-(shared_bytes + reserved) // unit) * unit
    by_shared = t.shared_sm // shared if shared else t.max_blocks
    return min(t.max_blocks, t.max_warps // num_warps, by_registers, by_shared)
