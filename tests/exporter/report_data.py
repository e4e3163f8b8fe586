"""A small run's artifacts, written by hand, for the report's tests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

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
        ("tuned", {"extracted": _stage(0.9, shares), "tuned": tuned}),
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
    return folder


def _write(folder: Path, name: str, schema: str, body: dict[str, Any], payload: str, content: bytes = b"weights") -> None:
    folder.mkdir(parents=True)
    (folder / payload).write_bytes(content)
    files = {payload: hashlib.sha256(content).hexdigest()}
    _json(folder / name, {"schema": schema, "tools": TOOLS, "files": files, **body})


def _json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body))
