"""`moee demo`: the main job from end to end on a real pretrained ViT."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exporter.belonging import BELONGS_TO
from exporter.graph.export import export
from exporter.parity import ParityResult, check_parity
from exporter.pretrained import resolve
from exporter.report import write_report
from exporter.timing.latency import LatencyResult, bench
from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.config import FinetuneConfig
from moee.data.image_set import batches
from moee.errors import MissingDependency, StepFailed
from moee.methods.recipe import make_recipe
from moee.parallel.joining import alone
from moee.places.demo_folder import DemoFolder
from moee.progress import Reporter, silent
from moee.stages.extract import run_extract
from moee.stages.finetune import run_finetune
from moee.stages.session import Session
from moee.store.artifact import write_json
from moee.store.result_kinds import DEMO

log = logging.getLogger("moee")

SCHEMA = "moee.summary/1"
MODEL, DATA = "dinov2-s", "digits"
KEEP = 0.90  # of the weighted variance: about 41 % fewer MACs on digits
CLUSTER_TOKENS = 6000  # a layer: seconds instead of minutes, for a demo
REFIT_TOKENS = 41_600  # 640 images
EPOCHS, LEARNING_RATE = 3, 1.5e-6  # a refitted model is near its optimum: the paper's 1.5e-5 throws it out
BATCH = 8


@dataclass
class DemoResult:
    """The summary that was written, and the parts that the closing table shows."""

    summary: dict[str, Any]
    moee: MoeeModel
    parity: ParityResult
    latency: LatencyResult
    engine_error: str | None = None


def run_demo(
    out: Path | str, *, force: bool = False, report: Reporter = silent, model: str = MODEL, data: str = DATA,
    epochs: int = EPOCHS, tokens: int | None = None, device: str = "auto",
) -> DemoResult:  # fmt: skip
    """Extract, fine-tune, export, verify, time and build; writes `out/{extracted,tuned,export,engine}`, the
    results as JSON and `report.html`.

    `device`: where torch computes (`moee.parallel.devices.chosen_device`). With `force`, an earlier demo in `out` is replaced,
    and nothing else that lies there.
    """
    group = alone(device)
    place = DemoFolder(out, force=force)
    place.check()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / DEMO.manifest, {"schema": f"{DEMO.schema}/1"})  # a later demo replaces what it finds beside this
    for name in place.files:
        (out / name).unlink(missing_ok=True)
    session = Session(resolve(model, data, report=report), data, report=report, group=group)
    values = {"keep": KEEP, "tokens": tokens, "cluster_tokens": CLUSTER_TOKENS, "refit_tokens": REFIT_TOKENS}
    extracted, tuned, exported = out / "extracted", out / "tuned", out / "export"
    run_extract(session.spec, data, make_recipe(values=values), extracted, force=True, report=report, session=session)
    place.folder("tuned.resume").remove()
    run_finetune(
        extracted, FinetuneConfig(epochs=epochs, lr=LEARNING_RATE), tuned, source=None, force=True, report=report,
        session=session,
    )  # fmt: skip
    moee = checkpoint.load(tuned)
    export(moee, exported, force=True, report=report, source=tuned)
    parity = check_parity(exported, moee, session.held_out, report=report)
    images = next(batches(session.held_out, BATCH)).images.numpy()
    latency = bench(exported, BATCH, images=images, report=report)
    engine, engine_error = None, None
    try:
        engine = _build(exported, out / "engine", report)
    except StepFailed as error:  # everything else is done: write it down, and let the caller say that this failed
        engine_error = " ".join(str(error).split())
    summary = _summary(moee, data, parity, latency, engine) | {BELONGS_TO: parity.belongs_to}
    for name, result in (("parity", parity), ("latency", latency)):
        place.file(f"{name}.json").write_json(result.to_json())
    place.file("summary.json").write_json(summary)
    write_report([out], out / "report.html", force=True)
    return DemoResult(summary, moee, parity, latency, engine_error)


def _build(exported: Path, out: Path, report: Reporter) -> dict[str, Any] | None:
    """The engines, built on the CPU; None where the builder or a compiler is not installed."""
    from exporter.engines.build import build_engines, needs_plugin, require_backend
    from exporter.engines.plugin_cache import DEMO_SMS, ensure_plugin

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


def _summary(
    moee: MoeeModel, data: str, parity: ParityResult, latency: LatencyResult, engine: dict[str, Any] | None
) -> dict[str, Any]:
    stages = moee.info["stages"]
    extracted, tuned = stages["extracted"], stages["tuned"]
    layers = [
        {"name": layer["name"], "experts": layer["experts"], "union": layer["union"], "mean_width": layer["mean_width"]}
        for layer in moee.info["layers"]
    ]
    return {
        "schema": SCHEMA,
        "model": moee.spec.name,
        "dataset": data,
        "dense": {
            "accuracy": extracted["retention"]["dense_accuracy"],
            "accuracy_interval": extracted["retention"]["dense_accuracy_interval"],
            "accuracy_images": extracted["retention"]["labelled"],
            **tuned["cost"]["dense"],
        },
        "moee": {
            "accuracy_extracted": extracted["retention"]["accuracy"],
            "accuracy_extracted_interval": extracted["retention"]["accuracy_interval"],
            "accuracy_finetuned": tuned["retention"]["accuracy"],
            "accuracy_finetuned_interval": tuned["retention"]["accuracy_interval"],
            **tuned["cost"]["moee"],
            "layers": layers,
        },
        "parity": {
            "runtime": parity.runtime,
            "max_abs_error": parity.max_abs_error,
            "route_agreement": parity.mean_route_agreement,
            "top1_agreement": parity.top1_agreement,
            "passed": parity.passed,
        },
        "latency": {
            "runtime": latency.runtime,
            "batch": latency.batch,
            "dense_ms": latency.dense_ms,
            "moee_ms": latency.moee_ms,
            "speedup": latency.speedup,
            "ideal_speedup": latency.ideal_speedup,
        },
        "engine": engine,
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": moee.info["peak_memory_bytes"],
    }
