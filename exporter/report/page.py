"""Puts the page together and writes it. It loads nothing: style, script and pictures are in the file, and a policy says so."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter.markup import Html, join, raw_text_element, tag
from exporter.markup.values import DASH, change, dig, fixed, percent, real, scientific, word
from exporter.report import agreement, examples, sections, selftest, tables, timing
from exporter.report.collect import collect
from exporter.report.front import front
from exporter.report.sources import EXAMPLES, PLAN, SELFTEST, Sources
from exporter.report.style import SCRIPT, STYLE
from moee.measure.accuracy import recorded_interval
from moee.places.inputs import source_paths
from moee.places.output_file import OutputFile
from moee.schema import data_title, shown
from moee.store.result_kinds import REPORT

log = logging.getLogger("moee")
SECTIONS = (
    ("front", "The front", front),
    ("cost", "What changed", sections.cost),
    ("retention", "What was kept", agreement.retention),
    ("parity", "Parity", agreement.parity),
    ("latency", "Latency", timing.latency),
    ("selftest", "On the GPU", selftest.selftest),
    ("classes", "Classes", examples.classes),
    ("routing", "Routing", sections.routing),
    ("experts", "Patches of the experts", examples.experts),
    ("layer-table", "Layers", tables.layer_table),
    ("engines", "Engines", sections.engines),
    ("reproduce", "Commands and versions", tables.reproduce),
    ("sources", "Sources", tables.read_from),
)
LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers"}  # a function is its own name
KIND_OF = {  # the file that a section is about
    "parity": "moee.parity", "latency": "moee.latency", "engines": "moee.engine", "front": PLAN, "classes": EXAMPLES,
    "experts": EXAMPLES,
}  # fmt: skip
MAX_BYTES = 3 << 20
MARGIN_BYTES = 64 << 10  # for what stands around the sections


def write_report(
    paths: Sequence[Path | str], out: Path | str, force: bool = False, verify: bool = True, *, no_examples: str = "",
    lines: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write the report about the artifacts in `paths` to the file `out`, atomically, and return it. From the job that makes it:
    `no_examples`, why there are none, and `lines`, what it came to.

    Raises `UserError` if nothing is found, or if `out` exists and `force` is off.
    """
    output = OutputFile(out, REPORT, force, source_paths(*paths))
    output.check()
    sources = collect(paths, verify)
    sources.no_examples, sources.lines = no_examples, tuple(lines)
    output.write_text(render(sources))
    for problem in sources.problems:
        log.warning("%s", shown(problem, quoted=False, limit=1000))
    return Path(out)


def render(sources: Sources) -> str:
    """The whole page. Plots fill it up to `MAX_BYTES`; those that do not fit are named."""
    built = [(id_, title, *_doubted(sources, id_, *made)) for id_, title, make in SECTIONS if (made := make(sources))[1]]
    model = sources.body("moee.model") or sources.body("moee.export") or sources.body(PLAN) or {}
    name = dig(model, "model", "name") or dig(sources.body("moee.summary"), "model") or "a model"
    data = model.get("data") or dig(sources.body("moee.summary"), "dataset")
    title = f"{word(name)} on {data_title(word(data))}" if data else word(name)
    first = dig(sections.stages(sources).get("extracted"), "data")
    if data and first and first != data:
        title += f" (extracted on {data_title(word(first))})"
    timm_name = dig(model, "model", "timm_name")
    library = LIBRARIES.get(str(dig(model, "model", "library") or "timm"))
    known = f"{library} model {timm_name}." if library and timm_name and timm_name != name else ""
    sub = " ".join(filter(None, [known, _method(model)]))
    links = [tag("li", tag("a", heading, href=f"#{id_}")) for id_, heading, _, _ in built]
    body = []
    room = MAX_BYTES - MARGIN_BYTES - sum(len(part.encode(errors="replace")) for *_, parts in built for part in parts)
    for id_, heading, verdict, parts in built:
        kind = {"passed": "good", "FAILED": "bad"}.get(verdict or "")
        shown = join([heading, " ", tag("span", verdict, class_=kind)]) if verdict else heading
        extra = _plots(sources, room) if id_ == "routing" else []
        body.append(
            tag("section", tag("h2", shown, id=f"{id_}-heading"), *parts, *extra, id=id_, aria_labelledby=f"{id_}-heading")
        )
    header = tag("header", tag("h1", "MoEE report: ", title), tag("p", sub, class_="sub") if sub else Html(""))
    cards = _cards(sources) if set(sources.artifacts) - {PLAN, SELFTEST} else Html("")
    items = [tag("li", line) for line in sources.lines]
    came = tag("section", tag("ul", *items), aria_label="Result") if items else Html("")
    main = tag("main", came, cards, *body, id="main")
    skip = tag("a", "Skip to the figures", href="#main", class_="skip")
    navigation = tag("nav", tag("ul", *links), aria_label="Sections")
    head = tag(
        "head", tag("meta", charset="utf-8"), tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy()), tag("meta", name="robots", content="noindex"),
        tag("title", f"MoEE report: {title}"), raw_text_element("style", STYLE),
    )  # fmt: skip
    page = tag("html", head, tag("body", skip, header, navigation, main, raw_text_element("script", SCRIPT)), lang="en")
    return f"<!doctype html>\n{page}\n"


def _doubted(sources: Sources, id_: str, verdict: str | None, parts: list[Html]) -> tuple[str | None, list[Html]]:
    """A section about a file that may be another model's says so first; one whose file is another's says only that."""
    kind = KIND_OF.get(id_, "")
    doubt = sources.doubts.get(kind)
    if doubt is None:
        return verdict, parts
    said = tag("p", f"{doubt[0].upper()}{doubt[1:]}.", class_="missing")
    return verdict, [said, *(parts if kind in sources.artifacts else parts[:-1])]  # the last one says that the file is missing


def _policy() -> str:
    """Only this style and this script may act, and nothing may be fetched."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return f"default-src 'none'; style-src {digest(STYLE)}; script-src {digest(SCRIPT)}; img-src data:; base-uri 'none'"


MAIN_OPTIONS = (  # of a step
    "attention_macs", "token_macs", "merge_tokens", "clustering", "experts", "top_k", "target_macs", "keep",
)  # fmt: skip


def _method(model: dict[str, Any]) -> str:
    """The steps of a model's recipe, each with its main options."""
    steps = dig(model, "recipe", "steps")
    if not isinstance(steps, list):
        return ""
    said = []
    for step in (step for step in steps if isinstance(step, dict)):
        known = {name: step[name] for name in MAIN_OPTIONS if isinstance(step.get(name), (str, int, float))}
        if "target_macs" in known:
            known.pop("keep", None)  # the budget decides how much is kept
        main = [f"{name.replace('_', ' ')} {value}" for name, value in known.items()]
        said.append(", ".join([word(step.get("method")), *main]))
    return f"{'; then '.join(said)}." if said else ""


def _cards(sources: Sources) -> Html:
    """The figures that decide, each with what it is compared with."""
    stage = sections.latest(sources)
    kept, cost, dense = (dig(stage, *path) or {} for path in (("retention",), ("cost", "moee"), ("cost", "dense")))
    cards = []
    accuracy, before = real(dig(kept, "accuracy")), real(dig(kept, "dense_accuracy"))
    if accuracy is not None and before is not None:
        points = f"{100 * (accuracy - before):+.2f}".replace("-", "−")
        interval = recorded_interval(kept, "accuracy")
        within = f"{percent(interval[0], 1)} to {percent(interval[1], 1)}; " if interval else ""
        title = "accuracy of a probe" if dig(kept, "probe") else "accuracy"
        cards.append((title, percent(accuracy), f"{within}dense {percent(before)}, {points} points"))
    else:
        detail = "cosine to dense; accuracy is not compared" if kept else "no model found"
        cards.append(("class feature", fixed(dig(kept, "class_cosine")), detail))
    for label, key in (("MACs", "macs"), ("parameters", "params")):
        cards.append((label, change(dig(cost, key), dig(dense, key)), "against dense"))
    speed = _either(sources, "moee.latency", "latency")
    others = [body for timing in sources.latencies if (body := timing.body) is not speed]
    beside = "".join(f"; {fixed(body.get('speedup'), 2, '×')} at batch {word(body.get('batch'))}" for body in others)
    detail = f"{word(speed.get('runtime'))}, batch {word(speed.get('batch'))}{beside}" if speed else "not timed"
    cards.append(("speed-up", fixed(speed.get("speedup"), 2, "×"), detail))
    agreed = _either(sources, "moee.parity", "parity")
    verdict = agreement.verdict(agreed) or DASH
    cards.append(("parity", verdict, f"largest error {scientific(agreed.get('max_abs_error'))}" if agreed else "not verified"))
    kinds = {"passed": " good", "FAILED": " bad"}
    items = [
        tag(
            "div",
            tag("dt", label),
            tag("dd", figure, class_=f"figure{kinds.get(figure, '')}"),
            tag("dd", note, class_="detail"),
            class_="card",
        )
        for label, figure, note in cards
    ]
    return tag("dl", *items, class_="cards")


def _either(sources: Sources, kind: str, key: str) -> dict[str, Any]:
    """A result of its own, or what the demo's summary says of it."""
    found = sources.body(kind) or dig(sources.body("moee.summary"), key)
    return found if isinstance(found, dict) else {}


def _plots(sources: Sources, room: int) -> list[Html]:
    """SVG files beside the artifacts, as pictures: a browser runs no script and fetches nothing in those. `room`: their bytes."""
    figures, left_out = [], []
    for path in sources.plots:
        data = base64.b64encode(path.read_bytes()).decode()
        if len(data) > room:
            left_out.append(path.name)
            continue
        room -= len(data)
        label = path.stem.replace("_", " ").replace("-", " ")
        figures.append(
            tag("figure", tag("img", src=f"data:image/svg+xml;base64,{data}", alt=label), tag("figcaption", label))
        )
    parts = [tag("h3", "Plots"), tag("div", *figures, class_="plots")] if figures else []
    if left_out:
        parts.append(tag("p", f"Left out for their size: {', '.join(left_out)}.", class_="missing"))
    return parts
