"""The drawing: one panel a pair of measures, as SVG that takes its colours from classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.front.points import DENSE, ROUTED, STATIC, Candidate, Front, Timing, dense_ms
from exporter.front.scale import Scale, span, useful_span
from exporter.markup import Html, raw_text_element, tag
from exporter.markup.values import DASH, fixed, percent

WIDTH, HEIGHT = 400, 310  # of a panel, in its own units: text of 12 is read at 390 pixels and at 1280
LEFT, RIGHT, TOP, BOTTOM = 50, 388, 22, 228
MOST_DETAIL = 60  # characters that fit below an axis
SIZE = 5  # half the width of a mark
LEGEND = ((DENSE, "dense model"), (STATIC, "one expert (static pruning)"), (ROUTED, "experts, or another method"))
INK, SOFT = "f-ink", "f-soft"


@dataclass(frozen=True)
class Measure:
    """One axis: what it is called, its value of a candidate, how a value is written, and the least range that it shows.

    `below` is a second line under each tick, `detail` one under the axis's name; `hollow` marks are of modelled figures.
    """

    label: str
    of: Callable[[Candidate], float | None]
    show: Callable[[float], str]
    least: float
    limit: Callable[[Front], float | None]
    below: Callable[[float], str] | None = None
    detail: str = ""
    hollow: bool = False


def _accuracy_limit(front: Front) -> float | None:
    dense, drop = front.dense, front.budget.get("max_drop")
    return None if dense is None or dense.accuracy is None or drop is None else dense.accuracy - drop / 100


ACCURACY = Measure("accuracy", lambda c: c.accuracy, lambda v: percent(v, 1), 0.02, _accuracy_limit)
COSINE = Measure("cosine to dense", lambda c: c.cosine, lambda v: fixed(v, 4), 0.004, lambda f: f.budget.get("min_cosine"))
PARAMETERS = Measure(
    "parameters, share of dense", lambda c: c.params, lambda v: percent(v, 0), 0.1, lambda f: f.budget.get("target_params")
)


def _times(front: Front) -> list[Measure]:
    """A measure for each way in which the candidates were timed."""
    return [_time(how, batch, timings, front.budget) for (how, batch), timings in front.timings.items()]


def _time(how: str, batch: str, timings: list[Timing], budget: dict[str, float]) -> Measure:
    """Time as a share of the dense model's, timed beside it; a second line gives milliseconds by the dense model's median."""
    middle, limit = dense_ms(timings), budget.get("target_latency_ms")

    def ratio(candidate: Candidate) -> float | None:
        timing = candidate.timing
        return timing.ratio if timing is not None and (timing.how, timing.batch) == (how, batch) else None

    return Measure(
        "time, share of dense", ratio, lambda v: percent(v, 0), 0.1, lambda _: None if limit is None else limit / middle,
        lambda v: f"{v * middle:.3g} ms", f"batch {batch}, {how}", timings[0].modelled,
    )  # fmt: skip


def panels(front: Front) -> list[Html]:
    """The panels of a front: accuracy, or the cosine where none is known or the budget asks for one, over each kind of time and
    over the parameters."""
    known = [c for c in front.candidates if c.accuracy is not None]
    rows = [ACCURACY] if known else []
    rows += [COSINE] if not known or "min_cosine" in front.budget else []
    pairs = [(y, x) for y in rows for x in [*_times(front), PARAMETERS]]
    return [drawn for y, x in pairs if (drawn := _panel(front, y, x)) is not None]


def table_rows(front: Front) -> tuple[list[str], list[list[object]], list[list[float | str]]]:
    """Head, rows and keys to sort by of the table that stands beside the panels."""
    head = ["candidate", "MACs", "parameters", "cosine", "accuracy (95 % interval)", "ms (dense)", "of dense", "timed"]
    rows: list[list[object]] = []
    keys: list[list[float | str]] = []
    for c in sorted(front.candidates, key=lambda c: (c.macs is None, c.macs or 0.0)):
        within = f" ({percent(c.interval[0], 1)} to {percent(c.interval[1], 1)})" if c.interval else ""
        t = c.timing
        time = [f"{fixed(t.ms, 2)} ({fixed(t.dense_ms, 2)})", percent(t.ratio, 1), f"{t.how}, batch {t.batch}"] if t else []
        name = c.name + (" – chosen" if c.chosen else "")
        cost = [percent(c.macs, 1), percent(c.params, 1)]
        rows.append([name, *cost, fixed(c.cosine), percent(c.accuracy) + within, *(time or [DASH, DASH, "not timed"])])
        timed: list[float | str] = [t.ms, t.ratio, t.how] if t else [0.0, 0.0, ""]
        keys.append([c.name, c.macs or 0.0, c.params or 0.0, c.cosine or 0.0, c.accuracy or 0.0, *timed])
    return head, rows, keys


def _panel(front: Front, y: Measure, x: Measure) -> Html | None:
    """One panel; None where no candidate but the dense model has both figures."""
    placed = [(c, a, b) for c in front.candidates if (a := x.of(c)) is not None and (b := y.of(c)) is not None]
    if not [c for c, _, _ in placed if c.role != DENSE]:
        return None
    x_limit, y_limit = x.limit(front), y.limit(front)
    keys = [b for c, _, b in placed if c.chosen or c.role == DENSE] + ([y_limit] if y_limit is not None else [])
    xs = Scale(*span([a for _, a, _ in placed] + ([x_limit] if x_limit is not None else []), x.least), LEFT, RIGHT)
    ys = Scale(*useful_span([b for _, _, b in placed], keys, y.least), BOTTOM, TOP)
    hidden = [b for _, _, b in placed if b < ys.low]
    parts = [*_axes(xs, ys, x, y), *_budget(xs, ys, x_limit, y_limit)]
    edge = " ".join(f"{xs(a):.1f},{ys(b):.1f}" for a, b in _best([(a, b) for _, a, b in placed]))
    parts.append(tag("polyline", tag("title", "no candidate is better in both"), points=edge, class_="f-front"))
    parts += [_name(c, xs(a), ys(b)) for c, a, b in placed if c.chosen or c.role == DENSE]  # under the marks
    for c, a, b in sorted(placed, key=lambda p: (p[0].chosen, p[0].role == DENSE)):
        title = f"{c.name}: {y.label} {y.show(b)}, {x.label} {x.show(a)}"
        parts.append(_mark(c, xs(a), ys(b), title, hollow=x.hollow and c.role != DENSE, below=b < ys.low))
    missing = len(front.candidates) - len(placed)
    said = [f"{len(hidden)} below this range, down to {y.show(min(hidden))}"] if hidden else []
    said += [f"{missing} without both figures"] if missing else []
    if said:
        note = f"Not in their place: {'; '.join(said)}" if hidden else f"Not drawn: {said[0]}"
        parts.append(tag("text", note, x=LEFT, y=HEIGHT - 6, class_=SOFT))
    chosen = next((f"; chosen: {c.name}, {y.show(b)} at {x.show(a)}" for c, a, b in placed if c.chosen), "")
    measured = f" ({x.detail})" if x.detail else ""
    label = f"{y.label} over {x.label}{measured}, {len(placed)} candidates{chosen}"
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="front")


def _best(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both: less of x, more of y; by rising x."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def _axes(xs: Scale, ys: Scale, x: Measure, y: Measure) -> list[Html]:
    parts = [tag("text", y.label, x=4, y=13, class_=INK)]
    for value in ys.ticks():
        at = f"{ys(value):.1f}"
        parts.append(tag("line", x1=LEFT, x2=RIGHT, y1=at, y2=at, class_="f-grid"))
        parts.append(tag("text", y.show(value), x=LEFT - 5, y=f"{ys(value) + 4:.1f}", text_anchor="end", class_=SOFT))
    for value in xs.ticks():
        at = f"{xs(value):.1f}"
        parts.append(tag("line", x1=at, x2=at, y1=TOP, y2=BOTTOM, class_="f-grid"))
        parts.append(tag("text", x.show(value), x=at, y=BOTTOM + 15, text_anchor="middle", class_=SOFT))
        if x.below is not None:
            parts.append(tag("text", x.below(value), x=at, y=BOTTOM + 29, text_anchor="middle", class_=SOFT))
    middle = (LEFT + RIGHT) / 2
    parts.append(tag("text", x.label, x=middle, y=BOTTOM + (45 if x.below else 32), text_anchor="middle", class_=INK))
    if x.detail:
        said = x.detail if len(x.detail) <= MOST_DETAIL else f"{x.detail[: MOST_DETAIL - 1]}…"
        parts.append(tag("text", said, x=middle, y=BOTTOM + 60, text_anchor="middle", class_=SOFT))
    return parts


def _budget(xs: Scale, ys: Scale, x_limit: float | None, y_limit: float | None) -> list[Html]:
    parts = []
    if y_limit is not None:
        at = f"{ys(y_limit):.1f}"
        parts.append(tag("line", tag("title", "budget"), x1=LEFT, x2=RIGHT, y1=at, y2=at, class_="f-budget"))
        beside = ys(y_limit) + (13 if ys(y_limit) < BOTTOM - 18 else -5)
        parts.append(tag("text", "budget", x=RIGHT, y=f"{beside:.1f}", text_anchor="end", class_="f-limit"))
    if x_limit is not None:
        at = f"{xs(x_limit):.1f}"
        parts.append(tag("line", tag("title", "budget"), x1=at, x2=at, y1=TOP, y2=BOTTOM, class_="f-budget"))
        parts.append(tag("text", "budget", x=f"{xs(x_limit) - 4:.1f}", y=BOTTOM - 22, text_anchor="end", class_="f-limit"))
    return parts


def _mark(c: Candidate, x: float, y: float, title: str, *, hollow: bool, below: bool) -> Html:
    kind = f"f-mark f-{c.role}{' f-hollow' if hollow else ''}"
    said = tag("title", title)
    if below:  # an arrow at the edge
        corners = [(x - SIZE, y - SIZE), (x + SIZE, y - SIZE), (x, y + SIZE)]
    elif c.role == DENSE:
        corners = [(x - SIZE, y - SIZE), (x + SIZE, y - SIZE), (x + SIZE, y + SIZE), (x - SIZE, y + SIZE)]
    elif c.role == STATIC:
        corners = [(x, y - SIZE - 1.5), (x + SIZE + 1.5, y), (x, y + SIZE + 1.5), (x - SIZE - 1.5, y)]
    else:
        corners = []
    shape = (
        tag("polygon", said, points=" ".join(f"{a:.1f},{b:.1f}" for a, b in corners), class_=kind)
        if corners
        else tag("circle", said, cx=f"{x:.1f}", cy=f"{y:.1f}", r=SIZE, class_=kind)
    )
    ring = tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=SIZE + 5, class_="f-ring") if c.chosen else ""
    return tag("g", shape, ring)


def _name(c: Candidate, x: float, y: float) -> Html:
    """The name beside the chosen mark, above it, and beside the dense one, below it, turned to where there is room."""
    left = x < (LEFT + RIGHT) / 2
    above = c.chosen and y > TOP + 24
    text = f"chosen: {c.method[:24]}" if c.chosen else c.method
    anchor = "start" if left else "end"
    at = y - 15 if above else y + (26 if c.chosen else 19)
    return tag("text", text, x=f"{x + (-4 if left else 4):.1f}", y=f"{at:.1f}", text_anchor=anchor, class_="f-name")


GAP, HEAD, COLUMNS = 16, 46, 3
FILE_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.f-page { fill: #ffffff; } .f-ink, .f-name { fill: #1b2430; } .f-soft { fill: #55606e; } .f-limit { fill: #a3262a; }
.f-title { font-size: 14px; font-weight: 600; } .f-name { font-weight: 600; }
.f-grid { stroke: #e2e6ea; } .f-front { fill: none; stroke: #8b96a3; stroke-width: 1.5; }
.f-budget { stroke: #a3262a; stroke-width: 1.5; stroke-dasharray: 5 4; }
.f-dense { fill: #8a6d2f; stroke: #8a6d2f; } .f-static { fill: #7a4b9c; stroke: #7a4b9c; }
.f-routed { fill: #1f6f9c; stroke: #1f6f9c; } .f-hollow { fill: #ffffff; stroke-width: 2; }
.f-ring { fill: none; stroke: #1b2430; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
  .f-page { fill: #12171d; } .f-ink, .f-name { fill: #e6ebf0; } .f-soft { fill: #a5b0bc; } .f-limit { fill: #f08d8f; }
  .f-grid { stroke: #2a333d; } .f-front { stroke: #7d8894; } .f-budget { stroke: #f08d8f; }
  .f-dense { fill: #d3ae62; stroke: #d3ae62; } .f-static { fill: #c39ae0; stroke: #c39ae0; }
  .f-routed { fill: #5fb0de; stroke: #5fb0de; } .f-hollow { fill: #12171d; } .f-ring { stroke: #e6ebf0; }
}
"""


def sheet(front: Front, title: str) -> str:
    """The panels of a front side by side as one SVG file with its own colours, light and dark."""
    drawn = panels(front)
    columns = max(1, min(COLUMNS, len(drawn)))
    rows = -(-len(drawn) // columns)
    width, height = columns * (WIDTH + GAP) + GAP, HEAD + max(1, rows) * (HEIGHT + GAP)
    parts: list[Any] = [raw_text_element("style", FILE_STYLE), tag("rect", width=width, height=height, class_="f-page")]
    parts.append(tag("text", title, x=GAP, y=20, class_="f-ink f-title"))
    at = GAP
    for role, text in LEGEND:
        parts += [_legend_mark(role, at + SIZE, 34), tag("text", text, x=at + 16, y=38, class_=SOFT)]
        at += 28 + 7 * len(text)
    for index, panel in enumerate(drawn):
        x, y = GAP + index % columns * (WIDTH + GAP), HEAD + index // columns * (HEIGHT + GAP)
        parts.append(tag("svg", panel, x=x, y=y, width=WIDTH, height=HEIGHT))
    view = f"0 0 {width} {height}"
    return tag(
        "svg", tag("title", title), *parts, xmlns="http://www.w3.org/2000/svg", viewBox=view, width=width, height=height
    )


def _legend_mark(role: str, x: float, y: float) -> Html:
    nobody = Candidate("", "", role, None, None, None, None, None, None)
    return _mark(nobody, x, y, role, hollow=False, below=False)
