"""The section on latency."""

from __future__ import annotations

from typing import Any

from exporter.markup import Html, table, tag
from exporter.markup.values import dig, fixed, numbers, percent, real, word
from exporter.report import charts
from exporter.report.sections import not_there
from exporter.report.sources import Sources


def latency(sources: Sources) -> tuple[str | None, list[Html]]:
    """Milliseconds a batch of both models, interleaved; each timing of the model that is shown, by its batch."""
    known = [artifact.body for artifact in sources.latencies]
    summary = dig(sources.body("moee.summary"), "latency")
    shown = known or ([summary] if isinstance(summary, dict) else [])
    if not shown:
        return None, [not_there("Timings (latency.json) were", "moee bench export --out latency.json")]
    parts: list[Html] = []
    for body in sorted(shown, key=lambda body: (str(body.get("runtime")), real(body.get("batch")) or 0)):
        parts += _timing(body, body.get("threads", dig(sources.body("moee.summary"), "threads")))
    machine = _flat(dig(shown[0], "environment", 0))
    if machine:
        parts.append(table(["machine", "value"], machine, "Where it was measured, before the first run"))
    if not known:
        parts.append(not_there("Details (latency.json) were", "moee bench export --out latency.json"))
    return None, parts


def _timing(shown: dict[str, Any], threads: object) -> list[Html]:
    """A chart, a table and the verdict of one timing."""
    rows: list[list[object]] = []
    drawn: list[tuple[str, list[float], dict[str, float], str]] = []
    for label, key, kind in (("dense", "dense", "dense"), ("MoEE", "moee", "moee")):
        marks = {p: v for p in ("p50", "p90", "p95", "p99") if (v := real(dig(shown, f"{key}_ms", p))) is not None}
        samples = samples_of(shown, key)
        if marks:
            drawn.append((label, samples, marks, kind))
        rows.append(
            [label, *[fixed(marks.get(p), 2) for p in ("p50", "p90", "p95", "p99")], word(len(samples) or shown.get("runs"))]
        )
    where = f"{word(shown.get('runtime'))}, batch {word(shown.get('batch'))}, {word(threads)} threads"
    parts = [charts.runs(drawn)] if drawn else []
    parts.append(table(["ms a batch", "p50", "p90", "p95", "p99", "runs"], rows, f"Latency, {where}"))
    low, high = shown.get("speedup_p5"), shown.get("speedup_p95")
    interval = f" (5th to 95th percentile of the pairs {fixed(low, 2)} to {fixed(high, 2)})" if real(low) is not None else ""
    ratio, ideal = real(shown.get("speedup")), real(shown.get("ideal_speedup"))
    of = f", {percent(ratio / ideal, 0)} of the ideal {fixed(ideal, 2)}×" if ratio and ideal else ""
    parts.append(tag("p", f"Speed-up {fixed(shown.get('speedup'), 2)}×{interval}{of}. Ideal: dense MACs over MoEE MACs."))
    said = dig(shown, "verdict", "text")
    if isinstance(said, str):
        parts.append(tag("p", f"Verdict: {said}"))
    rates = shown.get("throughput")
    if isinstance(rates, dict):
        figures = ", ".join(f"{name} {fixed(rate, 1)}" for name, rate in rates.items())
        parts.append(tag("p", f"Throughput, images a second with {word(shown.get('streams'))} requests in flight: {figures}."))
    return parts


def samples_of(latency: dict[str, Any], key: str) -> list[float]:
    """Milliseconds of every run of `dense` or `moee`; none in files of before they were kept."""
    return numbers(dig(latency, "samples_ms", key))


def _flat(environment: Any) -> list[list[object]]:
    """Rows of what the machine showed, nested or not; what it did not show is left out."""
    rows: list[list[object]] = []
    for name, value in environment.items() if isinstance(environment, dict) else ():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        shown = [(key, str(v)) for key, v in inner if isinstance(v, (str, int, float)) and v != ""]
        rows += [[f"{name} {key}".strip(), text] for key, text in shown if len(text) < 200]
    return rows
