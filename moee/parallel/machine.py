"""What this machine gives the process: the CPUs that it may use, threads and processes, products in half precision."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("moee")

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


def in_half(x: Tensor) -> Tensor:
    """`x` in half precision. Without /proc PyTorch does not know the processor and converts nothing; NumPy rounds alike."""
    try:
        return x.half()
    except RuntimeError as error:
        if "cpuinfo" not in str(error):
            raise
        return torch.from_numpy(x.numpy().astype(np.float16))


def startable_threads(count: int) -> int:
    """How many threads, at most `count`, can be started beside this one: a limit (ulimit -u, a container's) may leave fewer, and
    what computes in parallel would end the process there."""
    ready, found = threading.Event(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=ready.wait, daemon=True)
            thread.start()
            found.append(thread)
    except (RuntimeError, MemoryError):
        pass
    ready.set()
    for thread in found:
        thread.join()
    return len(found)


def startable_processes(count: int) -> int:
    """How many processes, at most `count`, can be started side by side; all of them where they are not forked."""
    if not hasattr(os, "fork"):
        return count
    waits, ends = os.pipe()
    children: list[int] = []
    try:
        for _ in range(count):
            child = os.fork()
            if child == 0:
                os.close(ends)
                os.read(waits, 1)
                os._exit(0)
            children.append(child)
    except OSError:
        pass
    finally:
        os.close(ends)
        os.close(waits)
        for child in children:
            os.waitpid(child, 0)
    return len(children)


def affordable_threads() -> None:
    """Compute on one thread where those that PyTorch takes cannot be started."""
    wanted = torch.get_num_threads()
    if wanted > 1 and startable_threads(wanted - 1) < wanted - 1:
        torch.set_num_threads(1)
        log.warning("%d threads cannot be started (ulimit -u): one computes; --threads 1 says so where a command has it", wanted)
