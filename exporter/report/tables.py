"""The per-layer table, and the closing sections: commands, versions, what was read and what was missing."""

from __future__ import annotations

from typing import Any

from exporter.figures import status_of
from exporter.markup import Html, table, tag
from exporter.markup.values import DASH, dig, fixed, numbers, percent, real, word
from exporter.report.commands import commands
from exporter.report.sections import latest, layers, merging, not_there
from exporter.report.sources import Sources
from moee.layers.report import routing_entropy

SHOWN_CLASSES = 20


def layer_table(sources: Sources) -> tuple[str | None, list[Html]]:
    """One row a layer, sorted by any column."""
    found = layers(sources)
    if not found and (merged := merging(sources)):
        return None, [tag("p", f"No MLP was cut. {merged}")]
    if not found:
        return None, [not_there("Layers of a model (moee.json) were", "moee extract")]
    routes = dig(sources.body("moee.parity"), "route_agreement")
    head = ["layer", "status", "experts", "hidden", "kept by any", "mean width", "widths", "noise"]
    entropies = _entropies(sources)
    head += ["routing entropy"] if entropies else []
    head += ["equal routes"] if isinstance(routes, dict) else []
    times = _times(sources)
    head += ["dense ms", "MoEE ms"] if times else []
    rows: list[list[object]] = []
    keys: list[list[float | str]] = []
    for index, layer in enumerate(found):
        hidden, mean = real(layer.get("hidden")), real(layer.get("mean_width"))
        widths = sorted(numbers(layer.get("widths")))
        span = f"{widths[0]:.0f} to {widths[-1]:.0f}" if widths else DASH
        share = f" ({percent(mean / hidden, 0)})" if mean is not None and hidden else ""
        row: list[object] = [
            word(layer.get("name")), status_of(layer) or DASH, fixed(layer.get("experts"), 0), fixed(hidden, 0),
            fixed(layer.get("union"), 0), f"{fixed(mean, 0)}{share}", span, percent(layer.get("noise"), 0),
        ]  # fmt: skip
        key: list[float | str] = [
            index, status_of(layer), real(layer.get("experts")) or 0.0, hidden or 0.0,
            real(layer.get("union")) or 0.0, mean or 0.0, widths[0] if widths else 0.0, real(layer.get("noise")) or 0.0,
        ]  # fmt: skip
        if entropies:
            row.append(fixed(entropies.get(str(layer.get("name"))), 2))
            key.append(entropies.get(str(layer.get("name")), -1.0))
        if isinstance(routes, dict):
            row.append(percent(dig(routes, str(layer.get("name"))), 4))
            key.append(real(dig(routes, str(layer.get("name")))) or 0.0)
        if times:
            pair = times.get(str(layer.get("name")), (None, None))
            row += [fixed(ms, 3) for ms in pair]
            key += [real(ms) or 0.0 for ms in pair]
        rows.append(row)
        keys.append(key)
    note = "Mean width: hidden neurons that a token meets, weighted by routing. "
    note += "Kept by any: neurons that at least one expert holds. "
    if any(layer.get("ranks") for layer in found):
        note += "A CLEAR-MoE layer holds no neurons: its widths are those of a dense MLP of equal MACs, kept by any that of one "
        note += "of equally many weights. "
    if entropies:
        note += "Routing entropy: of the experts' shares of the held-out tokens, over its maximum; 1 is even, 0 a single expert. "
    note += "Noise: calibration tokens that the clustering left outside every cluster. Press a column's head to sort."
    doubts = [
        f"{word(layer.get('name'))}: {text}"
        for layer in found
        for text in (layer["notes"] if isinstance(layer.get("notes"), list) else [])
    ]
    said = [tag("ul", *[tag("li", text) for text in doubts])] if doubts else []
    return None, [tag("p", note), *said, table(head, rows, "Layers", id_="layers", sort_keys=keys)]


def _entropies(sources: Sources) -> dict[str, float]:
    """Routing entropy of each layer of several experts, by the shares that the latest stage measured."""
    found = dig(latest(sources), "shares")
    shares = {str(name): numbers(values) for name, values in found.items()} if isinstance(found, dict) else {}
    return {n: routing_entropy(share) for n, share in shares.items() if len(share) > 1 and abs(sum(share) - 1) < 1e-3}


def _times(sources: Sources) -> dict[str, tuple[Any, Any]]:
    """Kernel milliseconds of each layer in both graphs, where `moee bench` profiled them."""
    found = dig(sources.body("moee.latency"), "layers", "layers")
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    return {str(row.get("name")): (row.get("dense_ms"), row.get("moee_ms")) for row in rows}


def reproduce(sources: Sources) -> tuple[str | None, list[Html]]:
    """Commands from the recorded configuration, and the versions that each artifact names."""
    lines = commands(sources)
    parts: list[Html] = []
    if lines:
        parts.append(tag("p", "Rebuilt from the configuration that the artifacts record; flags at their default are left out."))
        parts.append(tag("pre", tag("code", "\n".join(lines)), tabindex="0", aria_label="commands"))
    versions = {a.path: a.body["tools"] for a in sources.all if isinstance(a.body.get("tools"), dict)}
    names = sorted({str(name) for tools in versions.values() for name in tools})
    if versions:
        rows: list[list[object]] = [
            [f"{path.parent.name}/{path.name}", *[word(tools.get(name)) for name in names]]
            for path, tools in versions.items()
        ]
        parts.append(table(["artifact", *names], rows, "Versions that made it"))
    return None, parts or [tag("p", "No artifact here records its configuration.", class_="missing")]


def _images_read(sources: Sources) -> list[Html]:
    """What the model was made on: images, classes, what lacked a label or could not be read, and what was guessed."""
    body = sources.body("moee.model")
    facts = {split: dig(body, "info", "data_read", split) for split in ("train", "val")}
    columns = ("images", "classes", "unlabelled", "skipped")
    rows: list[list[object]] = [
        [split, *[fixed(dig(fact, column), 0) for column in columns]] for split, fact in facts.items() if isinstance(fact, dict)
    ]
    if not rows:
        return []
    parts = [table(["split", "images", "classes", "without a label", "unreadable"], rows, "Images that the model was made on")]
    names = dig(body, "classes")
    if isinstance(names, list) and names:
        listed = ", ".join(map(word, names[:SHOWN_CLASSES]))
        more = f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
        parts.append(tag("p", f"Classes 0 to {len(names) - 1}: {listed}{more}.", class_="wrap"))
    notes = dig(body, "info", "data_read", "notes")
    if isinstance(notes, list) and notes:
        parts.append(tag("ul", *[tag("li", str(note)) for note in notes]))
    return parts


def read_from(sources: Sources) -> tuple[str | None, list[Html]]:
    """Every file that was read, whether its hashes match, and what was not found."""
    rows: list[list[object]] = []
    for artifact in sources.all:
        rows.append([f"{artifact.folder.name}/{artifact.path.name}", f"{artifact.kind}/{artifact.version}", artifact.hashes])
    parts = [table(["file", "schema", "hashes of its files"], rows, "Read for this report"), *_images_read(sources)]
    if sources.problems:
        parts.append(tag("ul", *[tag("li", problem) for problem in sources.problems], class_="problems"))
    if sources.missing:
        items = [tag("li", f"{kind}: ", tag("code", command)) for kind, command in sources.missing]
        parts += [tag("p", "Not found, with the command that makes it:"), tag("ul", *items)]
    return None, parts
