"""The section on the self-test: what is right on a GPU, and routed against dense there."""

from __future__ import annotations

from typing import Any

from exporter.markup import Html, table, tag
from exporter.markup.values import DASH, dig, fixed, percent, real, word
from exporter.report.sources import Artifact, Sources


def selftest(sources: Sources) -> tuple[str | None, list[Html]]:
    """Checks and times of every selftest.json; nothing without one, since it takes a GPU. One that is emulated says so in each of
    its captions."""
    if not sources.selftests:
        return None, []
    parts: list[Html] = []
    for artifact in sources.selftests:
        parts += _one(artifact)
    parts.append(tag("p", "Names of layers are those of the self-test's cases, which may be another model's."))
    passed = all(artifact.body.get("passed") is True for artifact in sources.selftests)
    return "passed" if passed else "FAILED", parts


def _one(artifact: Artifact) -> list[Html]:
    body = artifact.body
    where = f"{word(dig(body, 'device', 'name'))}, sm_{word(dig(body, 'device', 'sm'))}, {_label(body)}"
    checks: list[list[object]] = [
        [*(word(check.get(key)) for key in ("name", "meaning", "comparisons")), _verdict(check)]
        for check in _dicts(body, "checks")
    ]
    parts = [table(["check", "what must hold", "compared", "result"], checks, f"Checks, {where}")]
    rows = [_row(timing) for timing in _dicts(body, "timing")]
    if rows:
        head = ["layer", "type", "batch", "tactic", "routed µs", "dense µs", "faster", "of the ideal", "dense by"]
        parts.append(table(head, rows, f"One call, p50, {where}"))
    elif isinstance(body.get("not_timed"), str):
        parts.append(tag("p", f"Not timed: {body['not_timed']}.", class_="missing"))
    return parts


def _label(body: dict[str, Any]) -> str:
    """*native* only where the file says so in both ways."""
    label = body.get("label")
    if body.get("native") is True and label == "native":
        return "native"
    return str(label) if isinstance(label, str) and label.startswith("emulated") else "emulated or not, it does not say"


def _verdict(check: dict[str, Any]) -> str:
    if check.get("passed") is True:
        return "right"
    failures = check.get("failures")
    if not check.get("comparisons"):
        return "not checked"
    return f"WRONG: {failures[0]}" if isinstance(failures, list) and failures else "WRONG"


def _row(timing: dict[str, Any]) -> list[object]:
    tactics = [t for t in timing.get("tactics", []) if isinstance(t, dict)] if isinstance(timing.get("tactics"), list) else []
    routed = next((t.get("p50_us") for t in tactics if t.get("name") == timing.get("winner")), None)
    dense = timing.get("dense") if isinstance(timing.get("dense"), dict) else {}
    words = [word(timing.get(key)) for key in ("case", "type", "batch", "winner")]
    figures = [fixed(routed, 1), fixed(dig(dense, "p50_us"), 1), fixed(timing.get("ratio"), 2, "×")]
    ideal = real(timing.get("ideal_share"))
    note = dig(dense, "note")
    by = word(dig(dense, "by")) + (f" ({note})" if isinstance(note, str) and note else "")
    return [*words, *figures, percent(ideal, 0) if ideal is not None else DASH, by]


def _dicts(body: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = body.get(key)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
