"""Latency of the dense and the routed model, interleaved in one process, so that both meet the same machine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exporter.belonging import built_from, export_ids
from exporter.engines.environment import environment
from exporter.graph.export import DENSE
from exporter.graph.runtime_graph import moee_graph
from exporter.manifests import input_shape, read_engine, read_export
from exporter.runners import EngineRunner, Runner, graph_runner
from exporter.timing.layer_profile import LayerProfile, profile_layers
from exporter.verdict import Verdict, judge
from moee.errors import UserError
from moee.parallel.machine import usable_cpus
from moee.progress import Reporter, silent

log = logging.getLogger("moee")
WARM_UP = 5
THROUGHPUT_BLOCKS = 6  # a model, alternating
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, repr=False)
class LatencyResult:
    """Milliseconds a batch, each run waited for. `speedup` is the verdict's ratio, dense over MoEE; p5 and p95: of single pairs.

    `throughput`: images a second with `streams` requests in flight, a figure of its own: overlapping requests hide what one
    alone would wait for. `environment` is taken before and after. `cuda_graph` is None off the GPU. `samples_ms`: every run of
    `dense` and `moee` in the order of the pairs, of which the even ones began with dense. `images`: whose they
    are, or noise. `belongs_to`: the export (`exporter.belonging`).
    """

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
    verdict: Verdict
    precision: str = "fp32"
    throughput: dict[str, float] | None = None
    streams: int = 1
    layers: LayerProfile | None = None
    cuda_graph: bool | None = None
    environment: list[dict[str, Any]] = field(default_factory=list)
    samples_ms: dict[str, list[float]] = field(default_factory=dict)
    images: str = "noise"
    belongs_to: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The verdict, as a notebook shows it, and the medians."""
        dense, moee = (times.get("p50", float("nan")) for times in (self.dense_ms, self.moee_ms))
        return f"{self.verdict.text}\nmedian of batch {self.batch}: dense {dense:.2f} ms, MoEE {moee:.2f} ms; {self.runtime}"

    def to_json(self) -> dict[str, Any]:
        body = asdict(self)
        body["verdict"] |= {"winner": self.verdict.winner, "text": self.verdict.text}
        return {"schema": "moee.latency/1", **body}


def percentiles(seconds: np.ndarray) -> dict[str, float]:
    """p50, p90, p95 and p99 in milliseconds."""
    return {f"p{p}": float(np.percentile(seconds, p) * 1e3) for p in PERCENTILES}


def time_in_turns(
    calls: Sequence[Callable[[], Any]], runs: int, duration_s: float = 0.0, report: Reporter = silent,
    clock: Callable[[], float] = time.perf_counter,
) -> np.ndarray:  # fmt: skip
    """Seconds [len(calls), N] of calls in turn, forwards and backwards: at least `runs` rounds and `duration_s` seconds."""
    for _ in range(WARM_UP):
        for call in calls:
            call()
    times: list[list[float]] = []
    began, order = clock(), range(len(calls))
    while len(times) < runs or clock() - began < duration_s:
        taken = [0.0] * len(calls)
        for which in order if len(times) % 2 == 0 else reversed(order):
            started = clock()
            calls[which]()
            taken[which] = clock() - started
        times.append(taken)
        passed = clock() - began
        expected = max(runs, round(len(times) * duration_s / passed)) if duration_s and passed else runs
        report("latency", min(len(times), expected - 1), expected)
    report("latency", len(times), len(times))
    return np.array(times).T


def throughput(
    pair: tuple[Callable[[], Any], Callable[[], Any]], batch: int, streams: int, seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:  # fmt: skip
    """Images a second of both with `streams` requests in flight, over alternating blocks of `seconds` in all."""
    done, spent = [0, 0], [0.0, 0.0]
    for block in range(2 * THROUGHPUT_BLOCKS):
        which = block % 2 if (block // 2) % 2 == 0 else 1 - block % 2
        counts, elapsed = _flood(pair[which], streams, seconds / (2 * THROUGHPUT_BLOCKS), clock)
        done[which] += counts
        spent[which] += elapsed
    return {name: done[i] * batch / spent[i] for i, name in enumerate(("dense", "moee"))}


def _flood(call: Callable[[], Any], streams: int, seconds: float, clock: Callable[[], float]) -> tuple[int, float]:
    """Finished calls of `streams` threads, and the time until the last of them ended."""
    counts = [0] * streams
    failures: list[BaseException] = []
    began = clock()

    def work(i: int) -> None:
        try:
            while counts[i] == 0 or clock() - began < seconds:
                call()
                counts[i] += 1
        except BaseException as error:  # a thread's error must not pass for a low figure
            failures.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(streams)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return sum(counts), clock() - began


def bench(
    export_dir: Path | str, batch: int = 8, *, runs: int = 40, threads: int | None = None, images: np.ndarray | None = None,
    report: Reporter = silent, duration_s: float = 0.0, provider: str = "cpu", engine: Path | str | None = None,
    cuda_graph: bool = False, streams: int = 2, throughput_s: float = 0.0, profile: bool = False, named: str = "given",
    trust_engine: bool = False,
) -> LatencyResult:  # fmt: skip
    """Time `dense.onnx` and the graph with experts (`portable.onnx`, or `runtime.onnx` where it runs) in turn, or the two engines
    of the folder `engine`.

    `images` [B, C, H, W] float32 should be real ones, since routing depends on them; noise otherwise. `named` says for the
    record what they are. `throughput_s` seconds go
    to throughput (0: not measured); `profile` adds the time of every routed layer (ONNX Runtime only). `cuda_graph` replays
    engines as CUDA graphs; `trust_engine` as in `EngineRunner`. Raises `MissingDependency` for an absent provider, plugin or GPU.
    """
    if batch < 1 or runs < 1 or duration_s < 0 or streams < 1:
        raise UserError(f"bench: expected batch, runs and streams of at least 1; came {batch}, {runs} and {streams}")
    manifest = read_export(export_dir, verify=False)
    precision = manifest.get("precision", "fp32")
    if precision == "bf16" and engine is None and provider == "cpu":
        raise UserError("ONNX Runtime has no bfloat16 kernels on the CPU, so there is nothing to time; use --engine or fp32")
    shape = (batch, *input_shape(manifest["input"]))
    real = images is not None
    if images is None:
        images = np.random.default_rng(0).standard_normal(shape, np.float32)
    images = np.ascontiguousarray(np.resize(images, shape))
    cost = manifest.get("cost") or {}
    threads = threads or usable_cpus()
    folder = Path(export_dir)
    if engine is not None:
        _require_same_export(folder, manifest, Path(engine), trust_engine)
    ours = moee_graph(manifest, provider) if engine is None else ""
    before = environment()
    with ExitStack() as stack:
        if engine is not None:
            both: list[Runner] = [_engine_runner(engine, name, cuda_graph, trust_engine) for name in ("dense", "moee")]
        else:
            both = [graph_runner(folder / name, threads, provider) for name in (DENSE, ours)]
        runners = [stack.enter_context(runner) for runner in both]
        calls = (runners[0].bound(images), runners[1].bound(images))
        times = time_in_turns(calls, runs, duration_s, report)
        rate = None
        if throughput_s > 0:
            in_flight = streams if engine is None else 1  # an engine's context serves one request at a time
            rate = throughput(calls, batch, in_flight, throughput_s)
        name = runners[1].name
    layers = None
    if profile and engine is None and provider == "cpu":
        layers = profile_layers(folder / DENSE, folder / ours, manifest["routed_layers"], images, threads)
    ratios, verdict = times[0] / times[1], judge(times[0], times[1])
    return LatencyResult(
        runtime=name,
        batch=batch,
        threads=threads,
        runs=times.shape[1],
        dense_ms=percentiles(times[0]),
        moee_ms=percentiles(times[1]),
        speedup=verdict.ratio,
        speedup_p5=float(np.percentile(ratios, 5)),
        speedup_p95=float(np.percentile(ratios, 95)),
        ideal_speedup=cost["dense"]["macs"] / cost["moee"]["macs"] if cost else None,
        precision=precision,
        verdict=verdict,
        throughput=rate,
        streams=streams if engine is None else 1,
        layers=layers,
        cuda_graph=cuda_graph if engine is not None else None,
        environment=[before, environment()],
        images=named if real else "noise",
        belongs_to=export_ids(manifest),
        samples_ms={name: [round(1e3 * float(s), 5) for s in row] for name, row in zip(("dense", "moee"), times, strict=True)},
    )


def _require_same_export(folder: Path, export: dict[str, Any], engine: Path, trust: bool) -> None:
    """Raises `UserError` if the engine was built from another export: figures of the two must not be mixed."""
    built = built_from(read_engine(engine, trust), export, folder / export["graphs"]["tensorrt"])
    if built is False:
        raise UserError(f"{engine} was built from another export than {folder}; run moee build again")
    if built is None:
        log.warning("it cannot be told whether %s was built from %s: an earlier version wrote one of them", engine, folder)


def _engine_runner(folder: Path | str, model: str, cuda_graph: bool, trust: bool = False) -> EngineRunner:
    return EngineRunner(folder, model, cuda_graph=cuda_graph, trust=trust)
