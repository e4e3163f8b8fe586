"""Times of calls in turn, on a GPU by events, on the CPU by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Call = Callable[[], Any]


def title(device: torch.device) -> str:
    """What results call the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, emulated: no figure here is a time"


def recorded(call: Callable[[], Tensor], device: torch.device) -> tuple[Call, Tensor]:
    """`call` as a replay of its CUDA graph, and the tensor that each replay fills; on the CPU as it is, and its result.

    It runs three times before, so that kernels are compiled and libraries have chosen theirs.
    """
    if device.type == "cpu":
        return call, call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, y


def in_turn(calls: Mapping[str, Call], device: torch.device, runs: int, seconds: float) -> dict[str, np.ndarray]:
    """Milliseconds [n] of each call, n at most `runs`: one of each a round, the first alternating, until `seconds` are over."""
    names, times = list(calls), {name: [] for name in calls}  # type: dict[str, list[float]]
    began = time.perf_counter()
    for i in range(-3 if device.type == "cuda" else 0, runs):
        if i > 2 and time.perf_counter() - began > seconds:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken = _one(calls[name], device)
            if i >= 0:
                times[name].append(taken)
    return {name: np.array(found) for name, found in times.items()}


def _one(call: Call, device: torch.device) -> float:
    if device.type == "cpu":
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def summary(times: Mapping[str, np.ndarray], first: str) -> dict[str, dict[str, float]]:
    """p50 and p95 in milliseconds of each, and how many times faster than `first` (the median over the rounds)."""
    return {
        name: {
            "p50_ms": round(float(np.percentile(found, 50)), 5), "p95_ms": round(float(np.percentile(found, 95)), 5),
            "ratio": round(float(np.median(times[first] / found)), 4), "runs": len(found),
        }
        for name, found in times.items()
    }  # fmt: skip
