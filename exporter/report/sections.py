"""Sections on cost, routing and engines. Each takes what was found and says so where something is missing."""

from __future__ import annotations

from typing import Any

from exporter.figures import SMALL, macs_unit
from exporter.markup import Html, table, tag
from exporter.markup.values import change, dig, fixed, numbers, real, scaled, word
from exporter.report import charts
from exporter.report.sources import Sources
from moee.store.artifact import stays_inside

STAGE_NAMES = {"extracted": "extracted", "tuned": "fine-tuned", "shrunk": "shrunk"}


def not_there(what: str, command: str) -> Html:
    """A sentence about what was not found, with the command that makes it."""
    return tag("p", f"{what} not found. ", tag("code", command), " makes it.", class_="missing")


def stages(sources: Sources) -> dict[str, dict[str, Any]]:
    """Stage name to its record, in the order of the pipeline."""
    found = dig(sources.body("moee.model"), "info", "stages")
    return {str(k): v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def latest(sources: Sources) -> dict[str, Any]:
    """The record of the last stage; empty without one."""
    return next(reversed(stages(sources).values()), {})


def layers(sources: Sources) -> list[dict[str, Any]]:
    """What the manifest says of each layer; empty where it says nothing."""
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
    per, letter = macs_unit(real(dig(dense, "macs")) or SMALL)
    for label, key, unit, suffix in (("MACs an image", "macs", per, f" {letter}"), ("parameters", "params", 1e6, " M")):
        was = dig(dense, key)
        now = [dig(stage, "cost", "moee", key) for stage in found.values()]
        rows.append([label, scaled(was, unit, 3, suffix), *[f"{scaled(v, unit, 3, suffix)} ({change(v, was)})" for v in now]])
    parts = [
        table(["", "dense", *names], rows, "Cost of one forward pass; routed layers weighted by the experts that tokens took")
    ]
    drawn = []
    for label, key, unit, suffix in (("MACs", "macs", per, f" {letter}"), ("parameters", "params", 1e6, " M")):
        for who, value, kind in (
            ("dense", dig(dense, key), "dense"),
            ("MoEE", dig(latest(sources), "cost", "moee", key), "moee"),
        ):
            if (number := real(value)) is not None:
                drawn.append((f"{label}, {who}", number / unit, scaled(value, unit, 3, suffix), kind))
    if drawn:
        groups = [[bar for bar in drawn if bar[0].startswith(label)] for label in ("MACs", "parameters")]
        parts += [charts.bars(group) for group in groups if group]
    if said := merging(sources):
        parts.append(tag("p", said))
    parts.append(_bytes(sources))
    return None, parts


def merging(sources: Sources) -> str:
    """How many tokens each block merges, as a sentence; empty where none are."""
    merged = numbers(dig(sources.body("moee.model"), "merging", "merged"))
    return f"Tokens that merge in each block: {', '.join(f'{count:.0f}' for count in merged)}." if merged else ""


def _bytes(sources: Sources) -> Html:
    rows: list[list[object]] = []
    for artifact in sources.all:
        for name in sorted(artifact.body.get("files") or {}) if isinstance(artifact.body.get("files"), dict) else ():
            file = artifact.folder / str(name)
            if stays_inside(artifact.folder, str(name)) and file.is_file():
                rows.append(
                    [f"{artifact.folder.name}/{name}", f"{file.stat().st_size:,}", scaled(file.stat().st_size, 2**20, 1, " MiB")]
                )
    if not rows:
        return tag("p", "The files themselves are not beside the manifests, so their sizes are not shown.", class_="missing")
    return table(["file", "bytes", "size"], rows, "Bytes on disk")


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
    """Files, sizes and build times of the engines, their target and their plugin."""
    body = sources.body("moee.engine")
    if body is None:
        short = dig(sources.body("moee.summary"), "engine")
        if isinstance(short, dict):
            text = f"{word(short.get('builder'))}: {word(short.get('plugin_layers'))} plugin layers (from the demo's summary)."
            return None, [tag("p", text), not_there("Details (engine.json) were", "moee build export --out engine")]
        return None, [not_there("Engines (engine.json) were", "moee build export --out engine")]
    rows: list[list[object]] = []
    for name in ("dense", "moee"):
        engine = dig(body, "engines", name)
        engine = engine if isinstance(engine, dict) else {}
        rows.append(
            [
                name,
                word(engine.get("file")),
                scaled(engine.get("size_bytes"), 2**20, 1, " MiB"),
                fixed(engine.get("build_s"), 1, " s"),
            ]
        )
    batch = [word(dig(body, "batch", key)) for key in ("min", "opt", "max")]
    facts = f"Builder: {word(body.get('builder'))}. Batch {'/'.join(batch)} (min/opt/max), "
    facts += f"{word(body.get('plugin_layers'))} plugin layers. "
    plugin = f"Plugin {word(dig(body, 'plugin', 'file'))}, sha256 {word(dig(body, 'plugin', 'sha256'))}."
    if dig(body, "plugin", "file") == "":
        plugin = "Standard operators alone, no plugin."
    return None, [
        table(["engine", "file", "size", "build time"], rows, f"Target: {word(body.get('target'))}"),
        tag("p", facts, plugin, class_="wrap"),
    ]
