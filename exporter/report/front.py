"""The section on plans: what was tried, on which device, and what was chosen."""

from __future__ import annotations

from exporter.front import LEGEND, Front, panels, read_front, table_rows
from exporter.markup import Html, table, tag
from exporter.markup.values import fixed, percent
from exporter.report.sections import not_there
from exporter.report.sources import Sources
from moee.schema import data_title

MOST_PLANS = 6  # a page shows no more


def front(sources: Sources) -> tuple[str | None, list[Html]]:
    """A block a plan: its panels, the chosen candidate, the budget and every figure."""
    if not sources.plans:
        return None, [not_there("A plan (plan.json) was", "moee plan")]
    legend = [tag("li", tag("span", "", class_=f"key {role}"), text) for role, text in LEGEND]
    legend.append(tag("li", tag("span", "", class_="key line"), "no candidate is better in both"))
    legend.append(tag("li", tag("span", "", class_="key limit"), "budget"))
    text = "Each mark is a model that was made and measured on held-out images; a hollow one has a modelled time. "
    text += "A time is held against the dense model timed beside it; the milliseconds below are by the dense model's median."
    parts = [tag("p", text), tag("ul", *legend, class_="legend")]
    for index, plan in enumerate(sources.plans[:MOST_PLANS]):
        parts += _plan(read_front(plan.body), plan.folder.name, index, several=len(sources.plans) > 1)
    if left := sources.plans[MOST_PLANS:]:
        said = f"Not shown: {', '.join(str(plan.path) for plan in left)}; make a report of each."
        parts.append(tag("p", said, class_="missing"))
    return None, parts


def _plan(shown: Front, folder: str, index: int, several: bool) -> list[Html]:
    where = "; ".join(f"{how}, batch {batch}" for how, batch in shown.timings) or "not timed on any device"
    heading = f"{where} ({folder})" if several else where
    parts = [tag("h3", heading[0].upper() + heading[1:])]
    budget = "; ".join(shown.limits()) or "none that is known"
    chosen = shown.chosen
    said = f"{shown.model} on {data_title(shown.data)}, {len(shown.candidates)} candidates. Budget: {budget}. "
    if chosen is None:
        said += "The plan names no winner among its candidates."
    else:
        figures = [f"cosine {fixed(chosen.cosine)}", f"{percent(chosen.macs, 1)} of the MACs"]
        figures += [f"{percent(chosen.params, 1)} of the parameters"]
        figures += [f"accuracy {percent(chosen.accuracy)}"] if chosen.accuracy is not None else []
        figures += [f"{percent(chosen.timing.ratio, 1)} of the dense model's time"] if chosen.timing is not None else []
        said += f"Chosen: {chosen.name}, {', '.join(figures)}."
    parts.append(tag("p", said, class_="wrap"))
    if shown.no_accuracy:
        parts.append(tag("p", f"Accuracy is not compared: {shown.no_accuracy}.", class_="missing"))
    drawn = panels(shown)
    if not drawn:
        parts.append(tag("p", "It holds no candidate with a quality and a cost to draw.", class_="missing"))
        return parts
    parts.append(tag("div", *drawn, class_="fronts"))
    if shown.not_drawn:
        parts.append(tag("p", f"{shown.not_drawn} further candidates are left out.", class_="missing"))
    head, rows, keys = table_rows(shown)
    return [*parts, table(head, rows, "Every candidate", id_=f"candidates-{index}", sort_keys=keys)]
