"""A small run's artifacts, written by hand, for the report's tests."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from exporter.belonging import export_ids, source_ids

TOOLS = {"moee": "0.1.0", "torch": "2.14.1", "timm": "1.0.31", "python": "3.11.7"}
EVIL = "<script>alert(1)</script>\"'&"


def _retention(accuracy: float) -> dict[str, Any]:
    return {
        **{"images": 40, "dense_accuracy": 0.95, "accuracy": accuracy, "top1_agreement": 0.9},
        **{"class_cosine": 0.99, "token_cosine": 0.98},
    }


def _stage(accuracy: float, shares: dict[str, list[float]]) -> dict[str, Any]:
    cost = {"dense": {"macs": 2_000_000_000, "params": 20_000_000}, "moee": {"macs": 1_000_000_000, "params": 15_000_000}}
    return {"retention": _retention(accuracy), "cost": cost, "shares": shares, "seconds": 1.0}


def write_run(folder: Path, layer: str = "blocks.0.mlp", model: str = "tiny", weights: bytes = b"weights") -> Path:
    """extracted, tuned, export and engine folders, parity.json and latency.json."""
    names = [layer, "blocks.1.mlp", "blocks.2.mlp"]
    shares = {name: [0.7, 0.3 - i / 10, i / 10] for i, name in enumerate(names)}
    widths = [[30, 9, 100], [8, 80, 20], [1, 2, 3]]
    layers = [
        {**{"name": name, "status": "routed", "hidden": 128, "experts": 3, "union": union, "widths": w, "share": shares[name]},
         **{"noise": 0.25, "mean_width": sum(w) / 3}}
        for name, union, w in zip(names, (100, 9, 50), widths, strict=True)
    ]  # fmt: skip
    losses = {"train": [0.3, 0.2], "validation": [0.5, 0.4, 0.3]}
    tuned = {**_stage(0.94, shares), "config": {"epochs": 2, "lr": 1e-6, "batch_size": 32}, "losses": losses}
    for name, stages in (
        ("extracted", {"extracted": _stage(0.9, shares)}),
        ("tuned", {"extracted": {**_stage(0.9, shares), "data_read": {}}, "tuned": tuned}),  # a later stage adds facts
    ):
        read = {"images": 1078, "classes": 10, "unlabelled": 0, "skipped": 2, "first_skipped": ["a.png", "b.png"]}
        notes = ["only val has images of 'tulip' (12)"]
        info = {"stages": stages, "layers": layers, "peak_memory_bytes": 1, "data_read": {"train": read, "notes": notes}}
        spec = {"name": model, "timm_name": "vit_tiny_patch16_224", "kwargs": {}, "pretrained": False}
        body = {
            "model": spec,
            "recipe": {"steps": [{"method": "experts", "keep": 0.9, "clustering": "kmeans", "clusters": 3}], "tune": None},
            "data": "digits",
            "classes": ["<b>zero", "one"],
            "layers": [],
            "info": info,
        }
        _write(folder / name, "moee.json", "moee.model/2", body, "model.safetensors", weights)
        made_from = source_ids(folder / name)
    body = {"model": {"name": model}, "data": "digits", "belongs_to": made_from}
    _write(folder / "export", "export.json", "moee.export/1", body, "moee.data", weights)
    measured = {"belongs_to": export_ids(json.loads((folder / "export" / "export.json").read_text()))}
    engine = {"file": "moee.plan", "sha256": "0" * 64, "size_bytes": 3 << 20, "build_s": 1.5}
    body = {
        **{"builder": "tensorrt-rtx 1.7.1 (built on CPU)", "target": "any GPU", "batch": {"min": 1, "opt": 8, "max": 32}},
        **{"plugin": {"file": "libmoee_plugin.so", "sha256": "1" * 64}, "plugin_layers": 3},
        "engines": {"dense": {**engine, "file": "dense.plan"}, "moee": engine},
        **measured,
    }
    _write(folder / "engine", "engine.json", "moee.engine/1", body, "moee.plan")
    batches = [{"batch": b, "max_abs_error": 1e-5 * b, "mean_abs_error": 1e-6, "output_rms": 2.0} for b in (1, 2, 8)]
    parity = {
        **{"runtime": "onnxruntime 1.31.0 CPU", "batches": batches, "route_agreement": dict.fromkeys(names, 1.0)},
        **{"top1_agreement": 1.0, "images": 40, "max_abs_error": 8e-5, "passed": True},
    }
    share = {"value": 0.95, "low": 0.9, "high": 0.98}
    accuracy = {
        **{"images": 40, "dense_top1": share, "moee_top1": share, "dense_top5": None, "moee_top5": None, "agreement": share},
        **{"kl": 0.01, "dense_ece": 0.02, "moee_ece": 0.03, "drop_pp": 0.25, "drop_interval_pp": [-0.5, 1.0]},
    }
    parity |= {"accuracy": accuracy, "cases": [{"group": "layer", "name": layer, "failure": None}], "first_deviation": None}
    _json(folder / "parity.json", {"schema": "moee.parity/1", **parity, **measured})
    latency = {
        **{"runtime": "onnxruntime 1.31.0 CPU", "batch": 8, "threads": 2, "runs": 5},
        **{"dense_ms": {"p50": 10.0, "p95": 12.0}, "moee_ms": {"p50": 5.0, "p95": 6.5}},
        **{"samples_ms": {"dense": [9.0, 10.0, 10.0, 11.0, 12.0], "moee": [4.0, 5.0, 5.0, 6.0, 6.5]}},
        **{"verdict": {"winner": "moee", "text": "MoEE is faster"}, "throughput": {"dense": 100.0, "moee": 180.5}, "streams": 2},
        **{"layers": {"layers": [{"name": layer, "dense_ms": 2.5, "moee_ms": 1.25}]}},
        **{"environment": [{"cpu": {"model": "a CPU", "mhz": None}, "gpu": None}]},
        **{"speedup": 2.0, "speedup_p5": 1.8, "speedup_p95": 2.2, "ideal_speedup": 2.5},
    }
    _json(folder / "latency.json", {"schema": "moee.latency/1", **latency, **measured})
    write_plan(folder / "plan", model)
    (folder / "plots").mkdir()
    _json(folder / "plots" / "examples.json", {**examples(layer), "belongs_to": made_from})
    return folder


def point(method: str, macs: float, accuracy: float | None, latency: dict[str, Any] | None, **figures: Any) -> dict[str, Any]:
    """A candidate of a plan; its recipe is its method and MACs."""
    recipe = None if method == "dense" else {"steps": [{"method": method, "target_macs": macs}]}
    interval = None if accuracy is None else [accuracy - 0.02, accuracy + 0.02]
    return {
        **{"method": method, "allocation": "" if method == "dense" else "share", "macs": macs, "params": macs + 0.1},
        **{"drop": None, "cosine": 1 - (1 - macs) / 100, "token_cosine": 0.9},
        **{"accuracy": accuracy, "accuracy_interval": interval},
        **{"latency": latency, "recipe": recipe, "attention": 1.0, **figures},
    }


def timed(ms: float, dense_ms: float = 10.0, kind: str = "measured on CPU", device: str = "cpu") -> dict[str, Any]:
    return {"kind": kind, "device": device, "batch": 8, "dense_ms": dense_ms, "moee_ms": ms, "speedup": dense_ms / ms}


def plan_body(model: str = "tiny", kind: str = "measured on CPU", device: str = "cpu", labelled: bool = True) -> dict[str, Any]:
    """Dense, static and two routed candidates, of which the second is chosen; timings of half, six and seven tenths of dense."""
    points = [
        point("static", 0.5, 0.91, timed(5.0, kind=kind, device=device)),
        point("kmeans-8", 0.6, 0.95, timed(6.0, kind=kind, device=device)),
        point("hdbscan", 0.7, 0.93, timed(7.0, kind=kind, device=device), attention=0.85),
        point("dense", 1.0, 0.95, timed(10.0, kind=kind, device=device), params=1.0, cosine=1.0),
    ]
    for p in points if not labelled else ():
        p |= {"accuracy": None, "accuracy_interval": None}
    budget = {"max_drop": 2.0 if labelled else None, "min_cosine": None if labelled else 0.995, "target_macs": None}
    budget |= {"target_params": 0.9, "target_latency_ms": 8.0}
    return {
        **{"model": {"name": model, "timm_name": "vit_tiny_patch16_224", "kwargs": {}, "pretrained": False}, "data": "digits"},
        **{"budget": budget, "points": points, "winner": points[1], "front": points[1:2]},
        "accuracy": {"images": 40, "labelled": 40 if labelled else 0, "no_accuracy": "" if labelled else "no labels"},
    }


def write_plan(folder: Path, model: str = "tiny", **facts: Any) -> Path:
    folder.mkdir(parents=True)
    _json(folder / "plan.json", {"schema": "moee.plan/2", "tools": TOOLS, "files": {}, **plan_body(model, **facts)})
    return folder


def jpeg(width: int = 40, height: int = 8) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(file, "JPEG")
    return {"picture": base64.b64encode(file.getvalue()).decode(), "width": width, "height": height}


def examples(layer: str = "blocks.0.mlp") -> dict[str, Any]:
    """The body of an `examples.json`."""
    rows = [{"name": "<b>zero", "images": 20, "dense": 18, "moee": 15}, {"name": "one", "images": 20, "dense": 20, "moee": 20}]
    shown = [{"label": "<b>zero", "dense": "<b>zero", "moee": "one", **jpeg(40, 40)}]
    experts = [{"expert": e, "share": share, "patches": 8, **jpeg(136, 16)} for e, share in ((1, 0.7), (0, 0.2998), (3, 0.0002))]
    experts.append({"expert": 2, "share": 0.0, "patches": 0})
    return {
        **{"schema": "moee.examples/1", "data": "digits", "images": 40, "of_images": 60},
        "classes": {"why": "", "rows": rows},
        "changed": {"why": "", "lost": 3, "gained": 0, "other": 1, "shown": shown},
        "experts": {
            "layers": [{"name": layer, "of": 4, "experts": experts}],
            "left_out": {"blocks.2.mlp": "it has one expert, which takes every token"},
        },
    }


def _write(folder: Path, name: str, schema: str, body: dict[str, Any], payload: str, content: bytes = b"weights") -> None:
    folder.mkdir(parents=True)
    (folder / payload).write_bytes(content)
    files = {payload: hashlib.sha256(content).hexdigest()}
    _json(folder / name, {"schema": schema, "tools": TOOLS, "files": files, **body})


def _json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body))
