"""What a timing was taken on: processor, clocks, power, temperature and driver, as far as the machine shows them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from moee.parallel.machine import usable_cpus

CPU_FREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")
CPU_INFO = Path("/proc/cpuinfo")
GPU_FIELDS = (
    "name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit",
    "temperature.gpu", "persistence_mode",
)  # fmt: skip
TIMEOUT_S = 5.0


def environment() -> dict[str, Any]:
    """A snapshot; what the machine does not show is None. Frequencies in MHz, power in watts, temperature in °C."""
    return {"cpu": cpu(), "gpu": gpu(), "power_mode": power_mode()}


def cpu() -> dict[str, Any]:
    """Model name, cores, governor, current and highest frequency, and the load average of the last minute."""
    current, highest = _number(CPU_FREQ / "scaling_cur_freq"), _number(CPU_FREQ / "cpuinfo_max_freq")
    shown = _cpuinfo("cpu MHz")
    return {
        "model": _cpuinfo("model name") or platform.processor() or None,
        "machine": platform.machine(),
        "cores": usable_cpus(),
        "governor": _text(CPU_FREQ / "scaling_governor"),
        "mhz": current / 1000 if current else float(shown) if shown else None,
        "max_mhz": highest / 1000 if highest else None,
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def gpu() -> dict[str, str] | None:
    """What nvidia-smi shows of the first GPU; None without one. Jetson's nvidia-smi leaves most fields out."""
    text = _command("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits")
    if not text:
        return None
    values = [v.strip() for v in text.splitlines()[0].split(",")]
    return dict(zip(GPU_FIELDS, values, strict=False))


def power_mode() -> str | None:
    """Jetson's power mode, such as MAXN."""
    text = _command("nvpmodel", "-q")
    for line in (text or "").splitlines():
        if "Power Mode" in line:
            return line.split(":", 1)[-1].strip()
    return None


def _command(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpuinfo(key: str) -> str | None:
    for line in (_text(CPU_INFO) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _number(path: Path) -> float | None:
    text = _text(path)
    return float(text) if text and text.isdigit() else None
