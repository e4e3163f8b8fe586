"""Several exports of one dense model and that model, timed in turns in one process: how much of the speed-up that its MACs allow
each of them reaches, at several batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.graph.export import DENSE
from exporter.graph.runtime_graph import moee_graph
from exporter.manifests import input_shape, read_export
from exporter.runners import graph_runner
from exporter.timing.latency import time_in_turns
from exporter.verdict import Verdict, judge
from moee.errors import UserError
from moee.parallel.machine import usable_cpus
from moee.progress import Reporter, silent
from moee.schema import shown

BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class Reached:
    """One export at one batch size. `p50_ms` and `dense_p50_ms`: milliseconds a batch; `verdict`: speed-up over dense with its
    99 % interval; `ideal`: dense MACs over the export's."""

    name: str
    batch: int
    runtime: str
    dense_p50_ms: float
    p50_ms: float
    ideal: float | None
    verdict: Verdict

    @property
    def share(self) -> float | None:
        """Realised over ideal speed-up."""
        return self.verdict.ratio / self.ideal if self.ideal else None


def side_by_side(
    folders: Sequence[Path | str], images: np.ndarray | None, batches: Sequence[int] = BATCHES, *, runs: int = 40,
    duration_s: float = 0.0, threads: int | None = None, provider: str = "cpu", report: Reporter = silent,
) -> list[Reached]:  # fmt: skip
    """Time the graph with experts of each export in `folders`, and the dense graph of the first, in turns; batch by batch.

    `images` [B, C, H, W] float32 should be real ones, since routing depends on them; noise where there are none. Each model is
    run at least `runs` times and for `duration_s` seconds a batch, all together. The rows are in the order of `batches`, then of
    `folders`. Raises `UserError` for exports of different dense models, of different inputs, or of different precision.
    """
    manifests = [read_export(folder, verify=False) for folder in folders]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        _refuse_another(folders[0], manifests[0], folder, manifest)
    names, rows = _names(folders), []
    threads = threads or usable_cpus()
    files = [Path(folders[0]) / DENSE, *(Path(f) / moee_graph(m, provider) for f, m in zip(folders, manifests, strict=True))]
    with ExitStack() as stack:
        runners = [stack.enter_context(graph_runner(file, threads, provider)) for file in files]
        for batch in batches:
            shape = (batch, *input_shape(manifests[0]["input"]))
            given = images if images is not None else np.random.default_rng(0).standard_normal(shape, np.float32)
            given = np.ascontiguousarray(np.resize(given, shape))
            times = time_in_turns([runner.bound(given) for runner in runners], runs, duration_s, report)
            p50 = np.median(times, axis=1) * 1e3
            for i, (name, manifest) in enumerate(zip(names, manifests, strict=True), start=1):
                cost = manifest.get("cost") or {}
                ideal = cost["dense"]["macs"] / cost["moee"]["macs"] if cost else None
                verdict = judge(times[0], times[i])
                rows.append(Reached(name, batch, runners[i].name, float(p50[0]), float(p50[i]), ideal, verdict))
    return rows


def _names(folders: Sequence[Path | str]) -> list[str]:
    """The folders' last parts, or the whole paths where those are not told apart."""
    names = [Path(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _refuse_another(first: Path | str, wanted: dict[str, Any], folder: Path | str, came: dict[str, Any]) -> None:
    """Raise `UserError` unless both exports are of one dense model: a ratio to another model's time says nothing."""
    facts = {
        "the dense weights": lambda m: m["files"].get("dense.data") or m["files"].get(DENSE),
        "the input": lambda m: m["input"],
        "the precision": lambda m: m.get("precision", "fp32"),
    }
    for what, fact in facts.items():
        if fact(wanted) != fact(came):
            raise UserError(
                f"{shown(str(folder))} differs from {shown(str(first))} in {what}: exports side by side need one dense model; "
                "export both from it alike"
            )
