"""Charts as rows: the label is HTML, the drawing an SVG that stretches with the column, so that phones can read both.

Every mark has a tooltip, and every chart stands beside a table with the same figures.
"""

from __future__ import annotations

from collections.abc import Sequence

from exporter.markup import Html, tag
from exporter.markup.values import percent

SHADES = 6  # of one hue, darkest for the largest share
MAX_TICKS = 400  # runs drawn; more would be one grey block


def _svg(*marks: object, label: str, height: int = 10, class_: str = "bar") -> Html:
    return tag(
        "svg", *marks, viewBox=f"0 0 100 {height}", preserveAspectRatio="none", role="img", aria_label=label, class_=class_
    )


def _row(label: object, drawing: Html, note: object) -> Html:
    return tag("div", tag("span", label, class_="label"), drawing, tag("span", note, class_="note"), class_="row")


def bars(rows: Sequence[tuple[str, float, str, str]]) -> Html:
    """(label, value, figure as text, CSS class) from zero, on one common scale."""
    top = max((value for _, value, _, _ in rows), default=0) or 1
    drawn = [
        _row(
            label,
            _svg(tag("rect", x=0, y=1, width=f"{100 * value / top:.3f}", height=8, class_=kind), label=f"{label}: {figure}"),
            figure,
        )
        for label, value, figure, kind in rows
    ]
    return tag("div", *drawn, class_="chart")


def shares(rows: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Html:
    """(layer, share of the tokens an expert, width an expert): one stacked bar a layer, largest expert first."""
    drawn = []
    for name, values, widths in rows:
        order = sorted(range(len(values)), key=lambda e: -values[e])
        total, x, marks = sum(values) or 1.0, 0.0, []
        for rank, expert in enumerate(order):
            width = 100 * values[expert] / total
            neurons = f", {widths[expert]:.0f} neurons" if expert < len(widths) else ""
            title = tag("title", f"{name}, expert {expert}: {percent(values[expert] / total, 1)} of the tokens{neurons}")
            shade = f"shade s{min(rank, SHADES - 1)}"
            marks.append(tag("rect", title, x=f"{x:.3f}", y=0, width=f"{width:.3f}", height=10, class_=shade))
            x += width
        largest = percent(max(values, default=0) / total, 0)
        count = f"{len(values)} expert{'s' if len(values) != 1 else ''}"
        drawn.append(
            _row(
                name, _svg(*marks, label=f"{name}: {count}, the largest takes {largest} of the tokens"), f"{count}, top {largest}"
            )
        )
    return tag("div", *drawn, class_="chart")


def runs(rows: Sequence[tuple[str, Sequence[float], dict[str, float], str]]) -> Html:
    """(label, milliseconds a run, percentiles, CSS class): a tick a run, a line a percentile, a bar from p50 to p95, one scale
    from zero. Without the runs the percentiles stand for their distribution."""
    top = max([v for _, samples, marks, _ in rows for v in [*samples, *marks.values()]], default=0) * 1.02 or 1
    drawn = []
    for label, samples, marks, kind in rows:
        step = max(1, -(-len(samples) // MAX_TICKS))
        ticks = [_tick(v, top, f"tick {kind}", 1, 9) for v in sorted(samples)[::step]]
        figures = [f"{name} {marks[name]:.2f} ms" for name in ("p50", "p95") if name in marks]
        heavy = []
        for name, value in marks.items():
            heavy.append(_tick(value, top, f"mark {kind}" if name == "p50" else f"mark thin {kind}", 0, 10, name))
        if {"p50", "p95"} <= marks.keys():
            start, end = (100 * marks[name] / top for name in ("p50", "p95"))
            heavy.append(
                tag("rect", x=f"{start:.3f}", y=3.5, width=f"{max(0.0, end - start):.3f}", height=3, class_=f"span {kind}")
            )
        text = ", ".join(figures)
        drawn.append(_row(label, _svg(*ticks, *heavy, label=f"{label}: {text}", class_="bar tall"), text))
    scale = tag("div", tag("span", "0"), tag("span", f"{top:.1f} ms"), class_="scale")
    return tag("div", *drawn, _row("", scale, ""), class_="chart", data_unit="ms")


def _tick(value: float, top: float, class_: str, y1: int, y2: int, name: str = "") -> Html:
    x = f"{100 * value / top:.3f}"
    return tag("line", tag("title", f"{name} {value:.3f} ms".strip()), x1=x, x2=x, y1=y1, y2=y2, class_=class_)


def lines(series: Sequence[tuple[str, Sequence[float], str]], last: int, x_label: str) -> Html:
    """(label, values, CSS class), from zero to the largest. Each series ends at position `last` of the x axis, which
    starts at 0: one that begins later is shorter."""
    top = max((v for _, values, _ in series for v in values), default=0) or 1
    marks = []
    for label, values, kind in series:
        start = last - (len(values) - 1)
        points = " ".join(f"{100 * (start + i) / max(1, last):.2f},{50 - 48 * v / top:.2f}" for i, v in enumerate(values))
        marks.append(tag("polyline", tag("title", label), points=points, class_=f"line {kind}"))
    described = "; ".join(f"{label} from {values[0]:.4g} to {values[-1]:.4g}" for label, values, _ in series if values)
    legend = [tag("li", tag("span", "", class_=f"swatch {kind}"), label) for label, _, kind in series]
    drawing = _svg(*marks, label=described, height=50, class_="plot")
    scale = tag("div", tag("span", "0"), tag("span", f"{x_label} {last}"), class_="scale")
    return tag(
        "div", tag("ul", *legend, class_="legend"), tag("div", f"{top:.4g}", class_="axis"), drawing, scale, class_="chart"
    )
