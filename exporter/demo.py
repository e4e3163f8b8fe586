"""`moee demo`: `moee compress` on a real pretrained ViT and built-in images, and engines built on the CPU beside it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exporter.belonging import BELONGS_TO
from exporter.compression.job import Compressed, Job
from exporter.compression.request import Request
from exporter.compression.state import reported
from exporter.pretrained import resolve
from exporter.report import write_report
from moee.artifacts import checkpoint
from moee.errors import MissingDependency, StepFailed
from moee.parallel.joining import alone
from moee.places.staged_folder import StagedFolder
from moee.planning.budget import Budget
from moee.progress import Reporter, silent
from moee.stages.session import Session
from moee.store.artifact import read_json

log = logging.getLogger("moee")

SCHEMA = "moee.summary/1"
MODEL, DATA = "dinov2-s", "photo-crops"
TIME_S = 540.0  # of ten minutes; the engines come after
REQUESTS = {  # by the images: what keeps to the time and shows experts at work
    # 400 held-out images tell accuracies apart by about 2.5 points, so the cosine is the sharper limit
    "photo-crops": Request(Budget(max_drop=3.0, min_cosine=0.97), methods=("kmeans-4",), heads=(0.75,), confirm="photo-crops:50"),
    "digits": Request(Budget(max_drop=1.0, min_cosine=0.99)),
}


@dataclass
class DemoResult:
    """What compressing gave, and the summary that was written."""

    compressed: Compressed
    summary: dict[str, Any]
    engine_error: str | None = None


def run_demo(
    out: Path | str, *, force: bool = False, report: Reporter = silent, model: str = MODEL, data: str = DATA,
    time_s: float | None = TIME_S, device: str = "auto", request: Request | None = None,
) -> DemoResult:  # fmt: skip
    """Compress, build engines, and write `summary.json` beside what `moee compress` writes into `out`.

    `device`: where torch computes (`moee.parallel.devices.chosen_device`). `request`: in place of the demo's own. With `force`,
    an earlier demo in `out` is replaced, and nothing else that lies there.
    """
    group = alone(device)
    place = StagedFolder(out, force=force)
    place.check()
    session = Session(resolve(model, data, report=report), data, report=report, group=group)
    asked = request or replace(REQUESTS[data], time_s=time_s)
    compressed = Job(session, place, asked, report).run()
    engine, engine_error = None, None
    try:
        engine = _build(place, report)
    except StepFailed as error:  # everything else is done: write it down, and let the caller say that this failed
        engine_error = " ".join(str(error).split())
    summary = _summary(session, compressed, engine)
    place.file("summary.json").write_json(summary)
    paths, why = reported(place.place, compressed.part)
    paths = [*dict.fromkeys([*paths, place.file("summary.json").place])]
    write_report(paths, place.place / "report.html", force=True, no_examples=why, lines=compressed.lines)
    return DemoResult(compressed, summary, engine_error)


def _build(place: StagedFolder, report: Reporter) -> dict[str, Any] | None:
    """The engines, built on the CPU; None where the builder or a compiler is not installed."""
    from exporter.engines.build import build_engines, needs_plugin, require_backend
    from exporter.engines.plugin_cache import DEMO_SMS, ensure_plugin

    exported, out = place.folder("export").place, place.folder("engine").place
    try:
        require_backend("tensorrt-rtx")
        plugin = ensure_plugin(DEMO_SMS, report) if needs_plugin(exported) else None
    except MissingDependency as error:
        log.warning("no engines: %s", error)
        return None
    report("build engines", 0, 1)
    built = build_engines(exported, out, plugin=plugin, force=True)
    report("build engines", 1, 1)
    return {"builder": built.builder, "path": str(out / built.moee.file), "plugin_layers": built.plugin_layers}


def _summary(session: Session, compressed: Compressed, engine: dict[str, Any] | None) -> dict[str, Any]:
    folder = compressed.folder
    kept = ("extracted", *["tuned"] * bool(compressed.stages.get("tuned", {}).get("kept")))
    made = {name: checkpoint.load(folder / name).info for name in kept if (folder / name).is_dir()}
    parity = read_json(folder / "verify" / "parity.json")
    latency = read_json(folder / "latency.json") if (folder / "latency.json").is_file() else None
    return summary_of(session.spec.name, session.source, compressed, made, parity=parity, latency=latency, engine=engine)


def summary_of(
    model: str, data: str, compressed: Compressed, made: dict[str, dict[str, Any]], *, parity: dict[str, Any],
    latency: dict[str, Any] | None, engine: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """The figures of every stage, by what was `made`: the `info` of the extracted and the tuned model. Those of a model that was
    not made are null. `parity` and `latency` are the bodies of their files."""
    measured = {name: info["stages"][name] for name, info in made.items()}
    extracted, last = measured.get("extracted"), measured.get("tuned") or measured.get("extracted")
    layers = made[max(made)]["layers"] if made else []
    return {
        "schema": SCHEMA,
        "model": model,
        "dataset": data,
        "shipped": compressed.shipped,
        "dense": {
            "accuracy": extracted["retention"]["dense_accuracy"] if extracted else None,
            "accuracy_interval": extracted["retention"]["dense_accuracy_interval"] if extracted else None,
            "accuracy_images": extracted["retention"]["labelled"] if extracted else None,
            **(last["cost"]["dense"] if last else {}),
        },
        "moee": {
            **{f"accuracy_{said}": _retained(measured.get(name), "accuracy") for name, said in STAGES.items()},
            **{f"accuracy_{said}_interval": _retained(measured.get(name), "accuracy_interval") for name, said in STAGES.items()},
            "cosine": _retained(last, "class_cosine"),
            **(last["cost"]["moee"] if last else {}),
            "layers": [{key: layer[key] for key in ("name", "experts", "union", "mean_width")} for layer in layers],
            "largest_share": {name: max(shares) for name, shares in last.get("shares", {}).items()} if last else {},
        },
        "parity": _parity(parity),
        "latency": _latency(latency),
        "engine": engine,
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": max((info["peak_memory_bytes"] for info in made.values()), default=None),
        "confirmed": compressed.stages.get("confirm"),
        "seconds": compressed.seconds,
        "lines": list(compressed.lines),
        BELONGS_TO: parity.get(BELONGS_TO, {}),
    }


STAGES = {"extracted": "extracted", "tuned": "finetuned"}


def _retained(stage: dict[str, Any] | None, key: str) -> Any:
    return stage["retention"][key] if stage else None


def _parity(body: dict[str, Any]) -> dict[str, Any]:
    figures = {key: body.get(key) for key in ("runtime", "max_abs_error", "top1_agreement", "passed")}
    agreement = list(body.get("route_agreement", {}).values())
    return {**figures, "route_agreement": sum(agreement) / len(agreement) if agreement else None}


def _latency(body: dict[str, Any] | None) -> dict[str, Any] | None:
    keys = ("runtime", "batch", "dense_ms", "moee_ms", "speedup", "ideal_speedup")
    return {key: body[key] for key in keys} if body is not None else None
