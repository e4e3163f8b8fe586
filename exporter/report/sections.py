"""The sections of the report. Each takes what was found and says so where something is missing."""

from __future__ import annotations

from typing import Any

from exporter.report import charts
from exporter.report.collect import Sources
from exporter.report.markup import Html, table, tag
from exporter.report.values import DASH, change, dig, fixed, numbers, percent, real, scaled, scientific

STAGE_NAMES = {"extracted": "extracted", "tuned": "fine-tuned"}


def not_there(what: str, command: str) -> Html:
    return tag("p", f"{what} not found. ", tag("code", command), " makes it.", class_="missing")


def stages(sources: Sources) -> dict[str, dict[str, Any]]:
    """Stage name to its record, in the order of the pipeline."""
    found = dig(sources.body("moee.model"), "info", "stages")
    return {str(k): v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def latest(sources: Sources) -> dict[str, Any]:
    return next(reversed(stages(sources).values()), {})


def layers(sources: Sources) -> list[dict[str, Any]]:
    found = dig(sources.body("moee.model"), "info", "layers")
    return [layer for layer in found if isinstance(layer, dict)] if isinstance(found, list) else []


def cost(sources: Sources) -> tuple[str | None, list[Html]]:
    """MACs, parameters and bytes, dense and at every stage."""
    found = stages(sources)
    if not found:
        return None, [not_there("A model's manifest (moee.json) was", "moee extract")]
    dense = dig(latest(sources), "cost", "dense")
    names = [STAGE_NAMES.get(name, name) for name in found]
    rows: list[list[object]] = []
    for label, key, unit, suffix in (("MACs an image", "macs", 1e9, " G"), ("parameters", "params", 1e6, " M")):
        was = dig(dense, key)
        now = [dig(stage, "cost", "moee", key) for stage in found.values()]
        rows.append([label, scaled(was, unit, 3, suffix), *[f"{scaled(v, unit, 3, suffix)} ({change(v, was)})" for v in now]])
    parts = [
        table(["", "dense", *names], rows, "Cost of one forward pass; routed layers weighted by the experts that tokens took")
    ]
    drawn = []
    for label, key, unit, suffix in (("MACs", "macs", 1e9, " G"), ("parameters", "params", 1e6, " M")):
        for who, value, kind in (
            ("dense", dig(dense, key), "dense"),
            ("MoEE", dig(latest(sources), "cost", "moee", key), "moee"),
        ):
            if (number := real(value)) is not None:
                drawn.append((f"{label}, {who}", number / unit, scaled(value, unit, 3, suffix), kind))
    if drawn:
        groups = [[bar for bar in drawn if bar[0].startswith(label)] for label in ("MACs", "parameters")]
        parts += [charts.bars(group) for group in groups if group]
    parts.append(_bytes(sources))
    return None, parts


def _bytes(sources: Sources) -> Html:
    rows: list[list[object]] = []
    for artifact in sources.all:
        for name in sorted(artifact.body.get("files") or {}) if isinstance(artifact.body.get("files"), dict) else ():
            file = artifact.folder / str(name)
            if ".." not in file.parts and file.is_file() and not file.is_symlink():
                rows.append(
                    [f"{artifact.folder.name}/{name}", f"{file.stat().st_size:,}", scaled(file.stat().st_size, 2**20, 1, " MiB")]
                )
    if not rows:
        return tag("p", "The files themselves are not beside the manifests, so their sizes are not shown.", class_="missing")
    return table(["file", "bytes", "size"], rows, "Bytes on disk")


def retention(sources: Sources) -> tuple[str | None, list[Html]]:
    """Accuracy and cosine to dense at every stage, and the loss of the fine-tuning."""
    found = stages(sources)
    if not found:
        return None, [not_there("A model's manifest (moee.json) was", "moee extract")]
    kept = {name: dig(stage, "retention") or {} for name, stage in found.items()}
    first = next(iter(kept.values()))
    rows: list[list[object]] = [
        ["accuracy", percent(dig(first, "dense_accuracy")), *[percent(dig(r, "accuracy")) for r in kept.values()]]
    ]
    for label, key, show in (
        ("same class as dense", "top1_agreement", percent),
        ("class feature, cosine to dense", "class_cosine", fixed),
        ("token features, cosine to dense", "token_cosine", fixed),
    ):
        rows.append([label, DASH, *[show(dig(r, key)) for r in kept.values()]])
    names = [STAGE_NAMES.get(name, name) for name in found]
    images, data = dig(first, "images"), dig(sources.body("moee.model"), "data")
    parts = [table(["", "dense", *names], rows, f"{fixed(images, 0)} held-out images of {data}")]
    losses = dig(found.get("tuned"), "losses")
    series = [(name, numbers(dig(losses, name)), kind) for name, kind in (("train", "moee"), ("validation", "dense"))]
    series = [s for s in series if len(s[1]) > 1]
    if series:
        parts += [tag("h3", "Fine-tuning loss"), charts.lines(series, max(len(s[1]) for s in series) - 1, "epoch")]
    return None, parts


def parity(sources: Sources) -> tuple[str | None, list[Html]]:
    """Errors of the exported graph against torch, and the routes that agree."""
    body = sources.body("moee.parity")
    if body is None:
        short = dig(sources.body("moee.summary"), "parity")
        if not isinstance(short, dict):
            return None, [not_there("A parity result (parity.json) was", "moee verify export --out parity.json")]
        rows: list[list[object]] = [
            ["runtime", str(short.get("runtime", DASH))], ["largest absolute error", scientific(short.get("max_abs_error"))],
            ["equal routes", percent(short.get("route_agreement"), 4)], ["same class", percent(short.get("top1_agreement"))],
        ]  # fmt: skip
        note = not_there("Details (parity.json) were", "moee verify export --out parity.json")
        return verdict(short), [table(["", "value"], rows, "Parity, from the demo's summary"), note]
    rows = []
    batches = body.get("batches")
    for batch in batches if isinstance(batches, list) else ():
        error, rms = real(dig(batch, "max_abs_error")), real(dig(batch, "output_rms"))
        relative = error / rms if error is not None and rms else None
        rows.append([str(dig(batch, "batch")), scientific(error), scientific(dig(batch, "mean_abs_error")), scientific(relative)])
    head = ["batch", "largest error", "mean error", "largest error / output rms"]
    parts = [table(head, rows, f"torch against {body.get('runtime', DASH)}")]
    routes = body.get("route_agreement")
    if isinstance(routes, dict):
        agreeing: list[list[object]] = [[str(name), percent(value, 4)] for name, value in routes.items()]
        keys: list[list[float | str]] = [[index, real(value) or 0.0] for index, value in enumerate(routes.values())]
        parts.append(table(["layer", "tokens on the same expert"], agreeing, "Routes", id_="routes", sort_keys=keys))
    parts.append(tag("p", f"Same class: {percent(body.get('top1_agreement'))} of {fixed(body.get('images'), 0)} images."))
    return verdict(body), parts


def verdict(body: Any) -> str | None:
    """`passed` or `FAILED`; None if the result does not say."""
    passed = dig(body, "passed")
    return "passed" if passed is True else "FAILED" if passed is False else None


def latency(sources: Sources) -> tuple[str | None, list[Html]]:
    """Milliseconds a batch of both models, interleaved."""
    body = sources.body("moee.latency")
    summary = dig(sources.body("moee.summary"), "latency")
    shown = body if body is not None else summary if isinstance(summary, dict) else None
    if shown is None:
        return None, [not_there("Timings (latency.json) were", "moee bench export --out latency.json")]
    rows: list[list[object]] = []
    drawn: list[tuple[str, list[float], dict[str, float], str]] = []
    for label, key, kind in (("dense", "dense", "dense"), ("MoEE", "moee", "moee")):
        marks = {p: v for p in ("p50", "p90", "p95", "p99") if (v := real(dig(shown, f"{key}_ms", p))) is not None}
        samples = samples_of(shown, key)
        if marks:
            drawn.append((label, samples, {p: marks[p] for p in ("p50", "p95") if p in marks}, kind))
        rows.append(
            [label, *[fixed(marks.get(p), 2) for p in ("p50", "p90", "p95", "p99")], str(len(samples) or shown.get("runs", DASH))]
        )
    where = f"{shown.get('runtime', DASH)}, batch {shown.get('batch', DASH)}, {shown.get('threads', DASH)} threads"
    parts = [charts.runs(drawn)] if drawn else []
    parts.append(table(["ms a batch", "p50", "p90", "p95", "p99", "runs"], rows, f"Latency, {where}"))
    low, high = shown.get("speedup_p5"), shown.get("speedup_p95")
    interval = f" (5th to 95th percentile of the pairs {fixed(low, 2)} to {fixed(high, 2)})" if real(low) is not None else ""
    ratio, ideal = real(shown.get("speedup")), real(shown.get("ideal_speedup"))
    of = f", {percent(ratio / ideal, 0)} of the ideal {fixed(ideal, 2)}×" if ratio and ideal else ""
    parts.append(tag("p", f"Speed-up {fixed(shown.get('speedup'), 2)}×{interval}{of}. Ideal: dense MACs over MoEE MACs."))
    if body is None:
        parts.append(not_there("Details (latency.json) were", "moee bench export --out latency.json"))
    return None, parts


def samples_of(latency: dict[str, Any], key: str) -> list[float]:
    """Milliseconds of every run of `dense` or `moee`, where the file holds them."""
    for found in (dig(latency, "samples_ms", key), dig(latency, f"{key}_samples_ms"), dig(latency, f"{key}_ms", "samples")):
        if values := numbers(found):
            return values
    return []


def routing(sources: Sources) -> tuple[str | None, list[Html]]:
    """Share of the tokens that each expert takes."""
    measured = dig(latest(sources), "shares")
    known = {str(layer.get("name")): layer for layer in layers(sources)}
    rows = []
    for name, layer in known.items():
        values = numbers(dig(measured, name)) or numbers(layer.get("share"))
        if values:
            rows.append((name, values, numbers(layer.get("widths"))))
    if not rows:
        return None, [not_there("Routing figures of a model (moee.json) were", "moee extract")]
    text = "Each bar is all tokens of a layer; each part one expert, the largest first and darkest. "
    text += "On held-out images where they were measured."
    return None, [tag("p", text), charts.shares(rows)]


def engines(sources: Sources) -> tuple[str | None, list[Html]]:
    body = sources.body("moee.engine")
    if body is None:
        short = dig(sources.body("moee.summary"), "engine")
        if isinstance(short, dict):
            text = f"{short.get('builder', DASH)}: {short.get('plugin_layers', DASH)} plugin layers (from the demo's summary)."
            return None, [tag("p", text), not_there("Details (engine.json) were", "moee build export --out engine")]
        return None, [not_there("Engines (engine.json) were", "moee build export --out engine")]
    rows: list[list[object]] = []
    for name in ("dense", "moee"):
        engine = dig(body, "engines", name) or {}
        rows.append(
            [
                name,
                str(engine.get("file", DASH)),
                scaled(engine.get("size_bytes"), 2**20, 1, " MiB"),
                fixed(engine.get("build_s"), 1, " s"),
            ]
        )
    batch = [str(dig(body, "batch", key) or DASH) for key in ("min", "opt", "max")]
    facts = f"Builder: {body.get('builder', DASH)}. Batch {'/'.join(batch)} (min/opt/max), "
    facts += f"{body.get('plugin_layers', DASH)} plugin layers. "
    plugin = f"Plugin {dig(body, 'plugin', 'file')}, sha256 {dig(body, 'plugin', 'sha256')}."
    return None, [
        table(["engine", "file", "size", "build time"], rows, f"Target: {body.get('target', DASH)}"),
        tag("p", facts, plugin, class_="wrap"),
    ]
