"""What this machine gives the process: the CPUs that it may use, and whether their products in half precision are fast."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2: "quota period" in microseconds, or "max period"
# Instructions that multiply in half precision, as `torch.cpu.get_capabilities` names them (x86, then ARM). Without them torch
# computes each product through float32, piece by piece: 13 to 40 times slower than float32 itself (512 x 512, AMD Zen 5, fp16).
FAST = {
    "bf16": ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "avx10_2", "fp16_arith"),
}


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity (taskset, SLURM) and a container's quota count, unlike in `os.cpu_count`."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, _quota() or affinity))


def _quota() -> int | None:
    """The container's share of the CPUs, rounded up; None without a limit."""
    try:
        quota, period = CGROUP_LIMIT.read_text().split()[:2]
        return -(-int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):  # no cgroup v2, or "max"
        return None


def fast_on_cpu(amp: str) -> bool:
    """Whether this machine's CPU multiplies in `amp` (bf16 or fp16) faster than in float32."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in FAST[amp])
