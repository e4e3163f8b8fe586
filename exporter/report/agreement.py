"""Sections on what was kept: accuracy and cosine to dense, and parity of the exported graphs."""

from __future__ import annotations

import math
from typing import Any

from exporter.markup import Html, table, tag
from exporter.markup.values import DASH, dig, fixed, numbers, percent, real, scientific, word
from exporter.report import charts
from exporter.report.sections import STAGE_NAMES, layers, not_there, stages
from exporter.report.sources import Sources
from moee.artifacts.stages import CHANGED, dense_differs, images_changed
from moee.measure.accuracy import counted, drop_in_words, recorded_interval
from moee.schema import data_title


def retention(sources: Sources) -> tuple[str | None, list[Html]]:
    """Accuracy and cosine to dense at every stage, and the loss of the fine-tuning."""
    found = stages(sources)
    if not found:
        return None, [not_there("A model's manifest (moee.json) was", "moee extract")]
    kept = {name: dig(stage, "retention") or {} for name, stage in found.items()}
    first = next(iter(kept.values()))
    model_data = dig(sources.body("moee.model"), "data")
    data = {name: dig(stage, "data") or model_data for name, stage in found.items()}
    ours: list[object] = [accuracy_of(r, "accuracy") for r in kept.values()]
    rows: list[list[object]] = [["accuracy (95 % interval)", accuracy_of(first, "dense_accuracy"), *ours]]
    changed = images_changed(found.values())
    if len(set(map(str, data.values()))) > 1 or changed or dense_differs(found.values()):  # no one dense figure is that of all
        rows = [
            ["accuracy (95 % interval)", DASH, *ours],
            ["dense, on the same images", DASH, *[accuracy_of(r, "dense_accuracy") for r in kept.values()]],
            ["held-out images of", DASH, *map(word, data.values())],
        ]
    for label, key, show in (
        ("same class as dense", "top1_agreement", percent),
        ("class feature, cosine to dense", "class_cosine", fixed),
        ("token features, cosine to dense", "token_cosine", fixed),
    ):
        rows.append([label, DASH, *[show(dig(r, key)) for r in kept.values()]])
    names = [STAGE_NAMES.get(name, name) for name in found]
    caption = f"{fixed(dig(first, 'images'), 0)} held-out images of {word(next(iter(data.values())))}"
    parts = [table(["", "dense", *names], rows, caption)]
    parts += [tag("p", note, class_="missing") for note in [*_accuracy_notes(kept), *[f"T{CHANGED[1:]}."] * changed]]
    missing = next((str(dig(r, "no_tokens")) for r in kept.values() if dig(r, "no_tokens")), "")
    parts += [tag("p", f"No cosine of token features: {missing}.")] if missing else []
    parts += _intervals(sources.body("moee.parity"))
    losses = dig(found.get("tuned"), "losses")
    series = [(name, numbers(dig(losses, name)), kind) for name, kind in (("train", "moee"), ("validation", "dense"))]
    series = [s for s in series if len(s[1]) > 1]
    if series:
        parts += [tag("h3", "Fine-tuning loss"), charts.lines(series, max(len(s[1]) for s in series) - 1, "epoch")]
    return None, parts


def accuracy_of(kept: Any, key: str) -> str:
    """A stage's accuracy with its 95 % interval."""
    interval = recorded_interval(kept, key) if isinstance(kept, dict) else None
    return percent(dig(kept, key)) + (f" ({percent(interval[0], 1)} to {percent(interval[1], 1)})" if interval else "")


def _accuracy_notes(kept: dict[str, Any]) -> list[str]:
    """Why an accuracy lacks, and that some images have no label."""
    found = []
    for r in kept.values():
        labelled, images = dig(r, "labelled"), dig(r, "images")
        if why := dig(r, "no_accuracy"):
            found.append(f"Accuracy is not compared: {why}.")
        elif isinstance(labelled, int) and isinstance(images, int) and (labelled != images or dig(r, "probe")):
            found.append(f"Accuracy on {counted(labelled, images, bool(dig(r, 'probe')))}.")
    return list(dict.fromkeys(found))


def _intervals(parity: Any) -> list[Html]:
    """Accuracy of the exported graphs with 95 % intervals, as `moee verify` measured it, or why it did not."""
    accuracy = dig(parity, "accuracy")
    if not isinstance(accuracy, dict):
        why = dig(parity, "no_accuracy")
        return [tag("p", f"Accuracy of the exported graphs was not measured: {why}.", class_="missing")] if why else []
    rows: list[list[object]] = []
    for label, key in (("top-1", "top1"), ("top-5", "top5")):
        pair = [dig(accuracy, f"{who}_{key}") for who in ("dense", "moee")]
        if any(pair):
            rows.append([label, *[_proportion(p) for p in pair]])
    rows.append(["expected calibration error", fixed(accuracy.get("dense_ece")), fixed(accuracy.get("moee_ece"))])
    facts = f"Top-1 {_drop(accuracy)}; same class {_proportion(accuracy.get('agreement'))}; "
    facts += f"KL divergence {fixed(accuracy.get('kl'), 5)} nats."
    labelled, images = accuracy.get("images"), accuracy.get("of_images")
    of = f"{fixed(labelled, 0)} images"
    if isinstance(labelled, int) and isinstance(images, int):
        of = counted(labelled, images, accuracy.get("probe") is True)
    data = f" of {data_title(word(dig(parity, 'data')))}" if dig(parity, "data") else ""
    caption = f"Against dense on {of}{data}, with 95 % intervals"
    return [table(["", "dense", "MoEE"], rows, caption), tag("p", facts)]


def _drop(accuracy: dict[str, Any]) -> str:
    """A gain is called one."""
    figures = accuracy.get("drop_pp"), *(dig(accuracy, "drop_interval_pp", i) for i in (0, 1))
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in figures):
        return f"drop {DASH}"
    drop, interval = drop_in_words(figures[0], figures[1:])
    return f"{drop} ({interval})"


def _proportion(value: Any) -> str:
    shown = percent(dig(value, "value"))
    return shown if shown == DASH else f"{shown} ({percent(dig(value, 'low'))} to {percent(dig(value, 'high'))})"


def parity(sources: Sources) -> tuple[str | None, list[Html]]:
    """Errors of the exported graph against torch, and the routes that agree."""
    body = sources.body("moee.parity")
    if body is None:
        short = dig(sources.body("moee.summary"), "parity")
        if not isinstance(short, dict):
            return None, [*_int8(sources), not_there("A parity result (parity.json) was", "moee verify export --out verify")]
        rows: list[list[object]] = [
            ["runtime", word(short.get("runtime"))], ["largest absolute error", scientific(short.get("max_abs_error"))],
            ["equal routes", percent(short.get("route_agreement"), 4)], ["same class", percent(short.get("top1_agreement"))],
        ]  # fmt: skip
        note = not_there("Details (parity.json) were", "moee verify export --out verify")
        return verdict(short), [table(["", "value"], rows, "Parity, from the demo's summary"), note]
    rows = []
    batches = body.get("batches")
    for batch in batches if isinstance(batches, list) else ():
        error, rms = real(dig(batch, "max_abs_error")), real(dig(batch, "output_rms"))
        relative = error / rms if error is not None and rms else None
        row = [word(dig(batch, "batch")), scientific(error), scientific(dig(batch, "tolerance_abs"))]
        rows.append([*row, scientific(dig(batch, "mean_abs_error")), scientific(relative)])
    typed = f", graph in {body['precision']}" if isinstance(body.get("precision"), str) else ""
    head = ["batch", "largest error", "allowed", "mean error", "largest error / output rms"]
    parts = [*_failures(body), *_int8(sources), table(head, rows, f"torch against {word(body.get('runtime'))}{typed}")]
    if rule := dig(body, "tolerance", "rule"):
        parts.append(tag("p", f"Allowed: {rule}."))
    routes = body.get("route_agreement")
    if isinstance(routes, dict) and not layers(sources):  # else they stand in the table of the layers
        agreeing: list[list[object]] = [[str(name), percent(value, 4)] for name, value in routes.items()]
        keys: list[list[float | str]] = [[index, real(value) or 0.0] for index, value in enumerate(routes.values())]
        parts.append(table(["layer", "tokens on the same expert"], agreeing, "Routes", id_="routes", sort_keys=keys))
    parts.append(tag("p", f"Same class: {percent(body.get('top1_agreement'))} of {fixed(body.get('images'), 0)} images."))
    return verdict(body), parts


def _int8(sources: Sources) -> list[Html]:
    """What an int8 export quantised, and the layers that it left out."""
    found = dig(sources.body("moee.export"), "quantization")
    said = []
    for name, label in (("dense", "dense model"), ("moee", "MoEE model")):
        scales, kept = dig(found, name, "input_scales"), dig(found, name, "kept")
        if not isinstance(scales, dict):
            continue
        left = f", left out: {', '.join(map(str, kept))}" if isinstance(kept, dict) and kept else ""
        said.append(
            f"{label}: {len(scales)} dense layers in int8, output {fixed(dig(found, name, 'sqnr_db'), 1)} dB over the noise on "
            f"{fixed(dig(found, name, 'images'), 0)} calibration images{left}"
        )
    return [tag("p", "; ".join(said) + ". Accuracy is held against the dense model in float32.")] if said else []


def _failures(body: dict[str, Any]) -> list[Html]:
    """The checks that failed or did not run, and the first layer that deviates."""
    cases = body.get("cases")
    items: list[Html] = []
    for key, before in (("failure", ""), ("skipped", "not checked, ")):
        said = [c for c in cases if dig(c, key)] if isinstance(cases, list) else []
        items += [tag("li", f"{before}{word(dig(c, 'group'))} {word(dig(c, 'name'))}: {word(dig(c, key))}") for c in said]
    first = body.get("first_deviation")
    if isinstance(first, dict):
        items.insert(0, tag("li", "first deviation: ", ", ".join(f"{k} {v}" for k, v in first.items() if v is not None)))
    return [tag("ul", *items, class_="problems")] if items else []


def verdict(body: Any) -> str | None:
    """`passed` or `FAILED`; None if the result does not say."""
    passed = dig(body, "passed")
    return "passed" if passed is True else "FAILED" if passed is False else None
