"""Latency of the dense and the routed graph, interleaved in one process, so that both meet the same machine."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.onnx_export import DENSE, MANIFEST, PORTABLE
from exporter.onnx_export import SCHEMA as EXPORT_SCHEMA
from exporter.runners import OnnxRunner
from moee.artifact import read_manifest
from moee.progress import Reporter, silent

WARM_UP = 5


@dataclass(frozen=True)
class LatencyResult:
    """Milliseconds a batch. `speedup` is the median of the ratios of neighbouring runs, dense over MoEE."""

    runtime: str
    batch: int
    threads: int
    runs: int
    dense_ms: dict[str, float]
    moee_ms: dict[str, float]
    speedup: float
    speedup_p5: float
    speedup_p95: float
    ideal_speedup: float | None

    def to_json(self) -> dict[str, Any]:
        return {"schema": "moee.latency/1", **asdict(self)}


def percentiles(seconds: np.ndarray) -> dict[str, float]:
    """p50 and p95 in milliseconds."""
    return {"p50": float(np.percentile(seconds, 50) * 1e3), "p95": float(np.percentile(seconds, 95) * 1e3)}


def bench(
    export_dir: Path | str, batch: int = 8, runs: int = 40, threads: int | None = None, images: np.ndarray | None = None,
    report: Reporter = silent,
) -> LatencyResult:  # fmt: skip
    """Time `dense.onnx` and `portable.onnx` in turn, the first of each pair alternating.

    `images` [B, 3, H, W] float32 should be real ones, since routing depends on them; noise otherwise.
    """
    manifest = read_manifest(export_dir, MANIFEST, EXPORT_SCHEMA, verify=False)
    size = manifest["input"]["size"]
    if images is None:
        images = np.random.default_rng(0).standard_normal((batch, 3, size, size), np.float32)
    images = np.ascontiguousarray(np.resize(images, (batch, 3, size, size)))
    cost = manifest.get("cost") or {}
    ideal = cost["dense"]["macs"] / cost["moee"]["macs"] if cost else None
    threads = threads or os.cpu_count() or 1
    times = np.zeros((2, runs))
    folder = Path(export_dir)
    with OnnxRunner(folder / DENSE, threads) as dense, OnnxRunner(folder / PORTABLE, threads) as moee:
        pair = (dense, moee)
        for _ in range(WARM_UP):
            for runner in pair:
                runner.run(images)
        for i in range(runs):
            for which in (0, 1) if i % 2 == 0 else (1, 0):
                started = time.perf_counter()
                pair[which].run(images)
                times[which, i] = time.perf_counter() - started
            report("latency", i + 1, runs)
        name = dense.name
    ratios = times[0] / times[1]
    return LatencyResult(
        runtime=name, batch=batch, threads=threads, runs=runs, dense_ms=percentiles(times[0]),
        moee_ms=percentiles(times[1]), speedup=float(np.median(ratios)), speedup_p5=float(np.percentile(ratios, 5)),
        speedup_p95=float(np.percentile(ratios, 95)), ideal_speedup=ideal,
    )  # fmt: skip
