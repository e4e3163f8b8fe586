"""Time of each routed layer in both graphs, from ONNX Runtime's own profile of every node.

Nodes carry the name of the module that they came from (`blocks.0.mlp.fc1/node_linear_2`), so a node belongs to the routed layer
whose name begins its own. ONNX Runtime renames nodes that it fuses; those are placed by their neighbours, and the rest counts as
`other`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporter.runners import OnnxRunner
from moee.store.scratch import temporary_folder

WARM_UP, RUNS = 3, 10


@dataclass(frozen=True)
class LayerTime:
    """Kernel time a batch in milliseconds of one routed layer in both graphs."""

    name: str
    dense_ms: float
    moee_ms: float

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.moee_ms if self.moee_ms else 0.0


@dataclass(frozen=True)
class LayerProfile:
    """Every routed layer, and everything else (attention, norms, embedding, head) as one figure a graph."""

    layers: list[LayerTime]
    other_dense_ms: float
    other_moee_ms: float
    runs: int


def profile_layers(
    dense: Path, moee: Path, layers: list[str], images: np.ndarray, threads: int, *, runs: int = RUNS
) -> LayerProfile:
    """Profile both graphs on `images` [B, 3, H, W]. Profiling itself slows small nodes down: compare layers, not totals."""
    sides = [node_times(graph, images, threads, runs) for graph in (dense, moee)]
    placed = [place(times, layers) for times in sides]
    rows = [LayerTime(name, placed[0][name], placed[1][name]) for name in layers]
    return LayerProfile(rows, placed[0][""], placed[1][""], runs)


def node_times(graph: Path, images: np.ndarray, threads: int, runs: int) -> dict[str, float]:
    """Mean kernel milliseconds a run, by node name."""
    with temporary_folder() as folder:
        with OnnxRunner(graph, threads, profile=folder / "profile") as runner:
            for _ in range(WARM_UP + runs):
                runner.run(images)
            trace = runner.end_profile()
        events = json.loads(trace.read_text(encoding="utf-8"))
    return sum_events(events, WARM_UP, runs)


def sum_events(events: list[dict], warm_up: int, runs: int) -> dict[str, float]:
    """Kernel events of ONNX Runtime's trace to mean milliseconds by node; the first `warm_up` runs are left out."""
    ends = sorted(e["ts"] + e["dur"] for e in events if e.get("name") == "model_run")
    since = ends[warm_up - 1] if warm_up and len(ends) >= warm_up else 0
    total: dict[str, float] = {}
    for event in events:
        if event.get("args", {}).get("op_name") == "If":
            continue  # its time is that of the nodes in the branch taken, which have events of their own
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= since:
            name = event["name"].removesuffix("_kernel_time")
            total[name] = total.get(name, 0.0) + event["dur"] / 1e3 / runs
    return total


def place(times: dict[str, float], layers: list[str]) -> dict[str, float]:
    """Milliseconds by routed layer; the key "" holds the rest. `times` is in the order of execution: a fused node, whose name
    says nothing, belongs to the layer whose nodes stand on both sides of it."""
    patterns = [(layer, re.compile(rf"(?:^|[^\w.]){re.escape(layer)}(?=[./]|$)")) for layer in layers]

    def owner(node: str) -> str | None:
        named = next((layer for layer, pattern in patterns if pattern.search(node)), None)
        return named if named is not None else "" if "." in node else None

    owners = [owner(node) for node in times]
    found = dict.fromkeys([*layers, ""], 0.0)
    for i, ms in enumerate(times.values()):
        before = next((o for o in reversed(owners[:i]) if o is not None), "")
        after = next((o for o in owners[i + 1 :] if o is not None), "")
        own = owners[i]
        found[own if own is not None else before if before == after else ""] += ms
    return found
