"""Where a CLEAR-MoE layer spends its time: stages of every dispatch backend, their bytes and FLOPs, and what bounds each.

A stage is memory-bound if its arithmetic intensity (FLOPs a byte) is below the machine balance: peak FLOP/s of a large float32
matrix product over the bandwidth of a large copy, both measured here. Bytes are the least that a stage must move: each operand
read once, each result written once, float32. An elementwise operation counts one FLOP.

With one thread the clock is this process's CPU time, so that other load on the machine does not count; with more it is the wall.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from exporter.graph.trace import to_onnx
from exporter.passes.clear import lower_clear_ffn
from exporter.passes.name_routes import name_routed_nodes
from moee.layers.activations import activate
from moee.layers.clear import ClearFFN, ClearParts
from moee.layers.clear_dispatch import BACKENDS, Factors, backend
from moee.layers.clear_routers import fit_router
from moee.progress import Reporter, silent

SCHEMA = "moee.dispatch/1"
WORD = 4  # bytes a float32
INDEX = 8
SLOW = ("triton",)  # backends that the CPU interprets: one run, no timing worth repeating


@dataclass(frozen=True)
class Machine:
    """Measured on this machine: `balance` in FLOPs a byte."""

    peak_gflops: float
    bandwidth_gb_s: float
    threads: int

    @property
    def balance(self) -> float:
        return self.peak_gflops / self.bandwidth_gb_s


@dataclass(frozen=True)
class Stage:
    """One stage of one backend; milliseconds are of one layer's whole batch."""

    backend: str
    stage: str
    p50_ms: float
    p95_ms: float
    flops: float
    bytes: float
    bound: str

    @property
    def intensity(self) -> float:
        return self.flops / max(self.bytes, 1.0)


@dataclass(frozen=True)
class FfnTime:
    """One graph form of the layer in ONNX Runtime: `speedup` is the median ratio of neighbouring runs, dense over this."""

    form: str
    macs_share: float
    p50_ms: float
    p95_ms: float
    speedup: float
    speedup_p5: float
    speedup_p95: float


@dataclass(frozen=True)
class DispatchReport:
    """Stages by backend, the graph forms, and the shapes that they were measured on."""

    machine: Machine
    shapes: dict[str, int]
    stages: list[Stage]
    forms: list[FfnTime]

    def to_json(self) -> dict[str, Any]:
        stages = [{**asdict(s), "intensity": s.intensity} for s in self.stages]
        return {
            "schema": SCHEMA, "machine": {**asdict(self.machine), "balance": self.machine.balance}, "shapes": self.shapes,
            "stages": stages, "forms": [asdict(f) for f in self.forms],
        }  # fmt: skip


def _clock() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _seconds(function: Callable[[], Any], runs: int) -> np.ndarray:
    clock, times = _clock(), np.zeros(runs)
    for i in range(runs):
        started = clock()
        function()
        times[i] = clock() - started
    return times


def measure_machine() -> Machine:
    """Best of a few large matrix products and copies."""
    size, megabytes, runs = 1536, 256, 7
    a, b = torch.randn(size, size), torch.randn(size, size)
    source = torch.randn(megabytes * 2**20 // WORD)
    target = torch.empty_like(source)
    product = _seconds(lambda: torch.mm(a, b), runs).min()
    copy = _seconds(lambda: target.copy_(source), runs).min()
    return Machine(2 * size**3 / product / 1e9, 2 * source.numel() * WORD / copy / 1e9, torch.get_num_threads())


def synthetic_layer(
    dim: int = 384, hidden: int = 1536, experts: int = 4, rank: int = 160, residual: int = 8,
) -> ClearFFN:  # fmt: skip
    """A layer of random weights, for shapes alone."""
    g = torch.Generator().manual_seed(0)

    def factors(inputs: int, outputs: int) -> Factors:
        rows = rank + experts * residual
        inward, outward = torch.randn(rows, inputs, generator=g), torch.randn(rows, outputs, generator=g)
        return Factors(inward / inputs**0.5, outward / rows**0.5, torch.randn(experts, outputs, generator=g), rank, residual)

    sample = torch.randn(1024, dim, generator=g)
    router, _ = fit_router("random", sample, torch.zeros(1024, dtype=torch.int64), experts, seed=0)
    return ClearFFN(ClearParts(router, factors(dim, hidden), factors(hidden, dim), "gelu")).eval()


def stage_work(name: str, layer: ClearFFN, tokens: int) -> dict[str, tuple[float, float]]:
    """(FLOPs, bytes) of each stage of a backend for `tokens` tokens."""
    t, d, h, k = tokens, layer.dim, layer.hidden, layer.num_experts
    r1, q1, r2, q2 = layer.ranks
    router = layer.parts().router
    routing = (2.0 * t * router.macs, WORD * (t * d + router.macs + t * k) + INDEX * t)
    moved = 2 * WORD * t * d + INDEX * t  # a gather of rows of width D
    permutation = {"loop": INDEX * t * (k + 1), "masked": 0.0, "triton": 2 * INDEX * t}.get(name, 2 * INDEX * t + moved)
    shared_flops = 2.0 * t * (r1 + r2) * (d + h)
    shared_bytes = WORD * (t * (2 * d + 2 * h + 2 * (r1 + r2)) + (r1 + r2) * (d + h))
    factor = {"masked": k, "triton": 2}.get(name, 1)
    terms = factor * (q1 + q2)
    flops = 2.0 * t * terms * (d + h) + t * (d + h)
    # inputs read, coefficients written and read, outputs written; the weights of all experts
    volume = WORD * (t * 2 * (d + h) + 2 * t * terms + k * (q1 + q2) * (d + h) + k * (d + h))
    if name == "loop":  # gathers its inputs and scatters its outputs in each map
        volume += 2 * WORD * t * (d + h) * 2
    combine = moved if name in ("sorted", "grouped") else 0.0
    return {
        "routing": routing, "permutation": (0.0, permutation), "shared products": (shared_flops, shared_bytes),
        "expert products": (flops, volume), "activation": (float(t * h), 2.0 * WORD * t * h), "combine": (0.0, combine),
    }  # fmt: skip


@torch.inference_mode()
def bench_backend(name: str, layer: ClearFFN, x: Tensor, runs: int, machine: Machine) -> list[Stage]:
    """Times of each stage of one backend on tokens x [T, D]."""
    parts, via = layer.parts(), backend(name)
    routes = parts.router.route(x)
    rows, plan = via.permute(x, routes, layer.num_experts)
    hidden = activate(parts.up.shared(rows) + via.residual(rows, plan, parts.up), layer.activation)
    y = parts.down.shared(hidden) + via.residual(hidden, plan, parts.down)
    calls: dict[str, Callable[[], Any]] = {
        "routing": lambda: parts.router.route(x),
        "permutation": lambda: via.permute(x, routes, layer.num_experts),
        "shared products": lambda: (parts.up.shared(rows), parts.down.shared(hidden)),
        "expert products": lambda: (via.residual(rows, plan, parts.up), via.residual(hidden, plan, parts.down)),
        "activation": lambda: activate(hidden, layer.activation),
        "combine": lambda: via.combine(y, plan),
    }
    work = stage_work(name, layer, len(x))
    stages = []
    for stage, call in calls.items():
        times = _seconds(call, 1 if name in SLOW and not x.is_cuda else runs) * 1e3
        flops, volume = work[stage]
        bound = "none" if not volume else "memory" if flops / volume < machine.balance else "compute"
        stages.append(Stage(name, stage, float(np.median(times)), float(np.percentile(times, 95)), flops, volume, bound))
    return stages


class DenseFFN(nn.Module):
    """fc1-act-fc2 of the same shapes and activation."""

    def __init__(self, dim: int, hidden: int, activation: str):
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Linear(dim, hidden), nn.Linear(hidden, dim), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.fc1(x), self.activation))


def _session(graph: ir.Model, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def bench_forms(layer: ClearFFN, x: Tensor, runs: int, threads: int, report: Reporter = silent) -> list[FfnTime]:
    """Dense FFN and both lowered forms in ONNX Runtime, interleaved, on tokens x [T, D]."""
    dense = DenseFFN(layer.dim, layer.hidden, layer.activation)
    sessions = {"dense": _session(to_onnx(dense, x), threads)}
    shares = {"dense": 1.0}
    whole = 2.0 * layer.dim * layer.hidden
    for form in ("sorted", "masked"):
        graph = to_onnx(layer, x)
        name_routed_nodes(graph, ["ffn"])
        lower_clear_ffn(graph, form)
        sessions[form] = _session(graph, threads)
        shares[form] = layer.macs_per_token(masked=form == "masked") / whole
    feed = {"input": x.numpy()}
    clock, times = _clock(), {name: np.zeros(runs) for name in sessions}
    for i in range(-3, runs):
        names = list(sessions) if i % 2 else list(sessions)[::-1]
        for name in names:
            started = clock()
            sessions[name].run(None, feed)
            if i >= 0:
                times[name][i] = clock() - started
        report("graph forms", max(0, i + 1), runs)
    result = []
    for name, seconds in times.items():
        ratio = times["dense"] / seconds
        p5, p50, p95 = (float(np.percentile(ratio, p)) for p in (5, 50, 95))
        ms = seconds * 1e3
        result.append(FfnTime(name, shares[name], float(np.median(ms)), float(np.percentile(ms, 95)), p50, p5, p95))
    return result


def bench_dispatch(
    layer: ClearFFN, x: Tensor, backends: list[str] | None = None, runs: int = 30, threads: int | None = None,
    *, report: Reporter = silent,
) -> DispatchReport:  # fmt: skip
    """All stages of the named backends (default: all that are installed) and the graph forms, for tokens x [T, D].

    `threads` of torch and ONNX Runtime; default: those that torch has.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _bench(layer, x, backends, runs, report)
    finally:
        torch.set_num_threads(before)


def _bench(layer: ClearFFN, x: Tensor, backends: list[str] | None, runs: int, report: Reporter) -> DispatchReport:
    machine = measure_machine()
    names = backends or list(BACKENDS)
    stages: list[Stage] = []
    for position, name in enumerate(names):
        report("dispatch", position, len(names))
        stages += bench_backend(name, layer, x, runs, machine)
    report("dispatch", len(names), len(names))
    r1, q1, r2, q2 = layer.ranks
    shapes = {
        "tokens": len(x), "dim": layer.dim, "hidden": layer.hidden, "experts": layer.num_experts, "up_rank": r1,
        "up_residual": q1, "down_rank": r2, "down_residual": q2,
    }  # fmt: skip
    return DispatchReport(machine, shapes, stages, bench_forms(layer, x, runs, machine.threads, report))
