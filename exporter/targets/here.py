"""Targets of this machine: its CPU, its GPU, and boards that are modelled."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from exporter.engines import plugin_cache
from exporter.engines.build import BuildFailed, build_engines, require_backend
from exporter.engines.environment import environment
from exporter.engines.worker import device_count
from exporter.manifests import BACKENDS
from exporter.runners.onnx_runtime import provider_works
from exporter.targets.candidates import Exported, exported, held_out_batch
from exporter.targets.roofline import board_of, roofline_facts, scale_of
from exporter.targets.target import Target, latency
from exporter.timing.device import CPU, latency_of, timed_board
from exporter.timing.form_times import measure_forms
from exporter.timing.latency import LatencyResult, bench
from moee.errors import MissingDependency, StepFailed, UserError
from moee.planning.forms import Latency
from moee.planning.shortlist import Candidate, Shortlist, Timed
from moee.progress import Reporter
from moee.stages.session import Session
from moee.store.scratch import temporary_folder

CUDA, TENSORRT = "cuda", "tensorrt"
RUNS, SECONDS = 40, 2.0  # of a pair on the GPU, whichever takes longer


@dataclass(frozen=True)
class Cpu(Target):
    """Each point is measured as it is made, by ONNX Runtime, in turns with dense; in float32 the forms of each layer too."""

    def check(self) -> None:
        if self.precision == "bf16":
            raise UserError("--precision bf16: ONNX Runtime has no bfloat16 kernels on the CPU; use fp32")

    def timing(self, session: Session, report: Reporter) -> Latency:
        timing = latency_of(CPU, session, self.batch, self.precision)
        if self.precision != "fp32":
            return timing
        return replace(timing, forms=measure_forms(session.dense, session.transform.shape, self.batch, report=report))


@dataclass(frozen=True)
class Board(Target):
    """Each point is modelled by the roofline of a board, which knows float16 alone."""

    @property
    def label(self) -> str:
        return f"{self.name} (modelled), batch {self.batch}"

    def check(self) -> None:
        timed_board(self.name)

    def timing(self, session: Session, report: Reporter) -> Latency:
        return latency_of(self.name, session, self.batch)


@dataclass(frozen=True)
class Gpu(Target):
    """This machine's GPU. `tensorrt` builds engines; `cuda` does so where TensorRT is installed, else runs the portable graphs by
    ONNX Runtime. Some points are measured together, each in turns with dense."""

    @property
    def engines(self) -> bool:
        return self.name == TENSORRT or _installed(TENSORRT)

    def check(self) -> None:
        if device_count() == 0 or not torch.cuda.is_available():
            raise MissingDependency(
                f"--device {self.name} needs an NVIDIA GPU with its driver, and none was found here; a GPU elsewhere is measured "
                "with ssh:HOST or --emit DIR"
            )
        if self.engines:
            require_backend(TENSORRT)
        elif not provider_works(CUDA):
            trt = BACKENDS[TENSORRT][2]
            raise MissingDependency(
                "--device cuda needs TensorRT or ONNX Runtime's CUDA provider, and neither works here; run "
                f"`pip install 'moee[{trt}]'` or `pip install onnxruntime-gpu`"
            )

    def timing(self, session: Session, report: Reporter) -> Shortlist:
        board = board_of(torch.cuda.get_device_name())
        ranking = latency_of(board, session, self.batch) if board is not None else None
        return Shortlist(self.most, partial(self._time, session, report), ranking)

    def _time(self, session: Session, report: Reporter, candidates: Sequence[Candidate]) -> Timed:
        images, name = held_out_batch(session, self.batch), torch.cuda.get_device_name()
        kind, modelled, runtime, before = f"measured on {name}", [], "", environment()
        latencies: list[dict[str, Any] | str] = []
        entries: list[dict[str, Any]] = []
        with temporary_folder() as place:
            for candidate in exported(candidates, session, self.precision, self.batch, place, report=report):
                modelled.append(candidate.modelled)
                try:
                    result = self._bench(candidate, images, place, report)
                except BuildFailed as error:
                    reason = f"no engine was built: {error}"
                    latencies.append(reason)
                    entries.append({"id": candidate.id, "failed": reason})
                    continue
                runtime = result.runtime
                dense, moee = result.dense_ms["p50"], result.moee_ms["p50"]
                latencies.append(latency(kind, name, self.batch, dense, moee, **result.verdict.span))
                entries.append({"id": candidate.id, "samples_ms": result.samples_ms})
        known = [said["dense_ms"] for said in latencies if isinstance(said, dict)]
        if not known:
            raise StepFailed(f"none of the candidates could be timed on {name}; of the first: {latencies[0]}")
        dense_ms = statistics.median(known)
        roofline = roofline_facts(None, name, modelled, latencies, dense_ms)
        facts = {
            "name": name, "runtime": runtime, "batch": self.batch, "precision": self.precision,
            "environment": [before, environment()],
            "candidates": entries, "roofline": roofline,
        }  # fmt: skip
        return Timed(latency(kind, name, self.batch, dense_ms, dense_ms), latencies, facts, scale_of(roofline))

    def _bench(self, candidate: Exported, images: Any, place: Path, report: Reporter) -> LatencyResult:
        timing = {"runs": RUNS, "duration_s": SECONDS, "images": images, "named": "held-out images"}
        if not self.engines:
            return bench(candidate.folder, self.batch, provider=CUDA, **timing)
        plugin = None
        if candidate.plugin:
            major, minor = torch.cuda.get_device_capability()
            plugin = plugin_cache.ensure_plugin((10 * major + minor,), report)
        profile = (self.batch, self.batch, self.batch)
        engine, cache = place / "engine", place / "timing.cache"
        build_engines(
            candidate.folder, engine, plugin=plugin, backend=TENSORRT, batch=profile, timing_cache=cache, force=True,
            progress=lambda text: report(text, 0, 0),
        )  # fmt: skip
        return bench(candidate.folder, self.batch, engine=engine, **timing)


def _installed(backend: str) -> bool:
    try:
        require_backend(backend)
    except MissingDependency:
        return False
    return True
