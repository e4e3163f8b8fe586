"""The five lines that `moee compress` ends with: accuracy, speed, size, what was chosen and why, where the bundle is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exporter.compression.request import CPU, described
from exporter.graph.export import DENSE_DATA, MOEE_DATA
from exporter.terminal.ui import percent
from exporter.verdict import MIN_EFFECT
from moee.measure.accuracy import drop_in_words
from moee.places.staged_folder import StagedFolder
from moee.planning.budget import Budget
from moee.schema import shown

NAMED = 4  # ways in a line
NAMES = {
    "static": "static pruning", "tokens": "merged tokens", "lowrank": "low-rank maps", "corp": "structured pruning (corp)",
    "dense": "the dense model",
}  # fmt: skip


def way(point: dict[str, Any]) -> str:
    """`8 experts a layer (kmeans-8) beside 75 % of the attention`."""
    method = str(point["method"])
    name = NAMES.get(method, f"experts ({method})")
    name += f" after merging tokens to {point['tokens']:.0%} of the MACs" if point.get("tokens", 1) < 1 else ""
    return name + (f" beside {point['attention']:.0%} of the attention's MACs" if point["attention"] < 1 else "")


def named_ways(ways: Sequence[dict[str, Any]]) -> str:
    """Names of a few, and how many others there are."""
    names = list(dict.fromkeys(map(way, ways)))
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f", and {more} more way{'s' * (more > 1)}" if more > 0 else "")


def accuracy_line(
    kept: dict[str, Any] | None, confirmation: dict[str, Any] | None = None, most: float | None = None
) -> str:
    """`kept`: the retention of the model that was shipped; None for the dense one without a measurement. `confirmation`: the same
    on images that nothing was chosen by, where there are some; `most`: points that the budget allows."""
    if kept is None:
        return "accuracy: the dense model's own"
    cosine = f"cosine to the dense outputs {kept['class_cosine']:.4f}"
    if kept.get("accuracy") is None:
        return f"accuracy: not compared ({kept['no_accuracy']}); {cosine}" + (confirmed_by(confirmation) if confirmation else "")
    drop = 100 * (kept["dense_accuracy"] - kept["accuracy"])
    told, interval = drop_in_words(drop, kept["drop_interval_pp"])
    probe = " by a probe on the features" if kept.get("probe") else ""
    of = f"{kept['labelled']} held-out images{probe}"
    return (
        f"accuracy: {percent(kept['accuracy'])} of {of}, dense {percent(kept['dense_accuracy'])} "
        f"({told}, 95 % interval {interval}); {cosine}"
    ) + (confirmed_by(confirmation, drop, most) if confirmation else "")


def confirmed_by(confirmation: dict[str, Any], drop: float | None = None, most: float | None = None) -> str:
    """The end of the accuracy's line. `drop`: that on the held-out images, by which the model was chosen; `most`: what the budget
    allows. Both in points."""
    kept = confirmation["retention"]
    new = f"images of {shown(confirmation['data'], quoted=False)} that nothing was chosen by"
    cosine = f"cosine {kept['class_cosine']:.4f}"
    if kept.get("accuracy") is None:
        why = kept.get("no_accuracy")
        return f"; on {kept['images']} {new}: {cosine}" + (f", accuracy not compared ({why})" if why else "")
    found = 100 * (kept["dense_accuracy"] - kept["accuracy"])
    text, interval = drop_in_words(found, kept["drop_interval_pp"])
    told = [text, f"95 % interval {interval}"]
    if drop is not None:
        apart = "as" if abs(found - drop) < 0.005 else f"{abs(found - drop):.2f} {'worse' if found > drop else 'better'} than"
        told.append(f"{apart} where it was chosen")
    if most is not None and found > most:
        told.append(f"more than the {most:g} of the budget")
    return (
        f"; on {kept['labelled']} {new}: {percent(kept['accuracy'])}, dense {percent(kept['dense_accuracy'])} "
        f"({', '.join(told)}); {cosine}"
    )


def speed_line(latencies: list[dict[str, Any]], planned: dict[str, Any] | None) -> str:
    """`latencies`: results of the CPU's timing, one a batch; `planned`: what the plan measured or modelled for another device."""
    parts = []
    if planned is not None:
        ratio = planned["dense_ms"] / planned["moee_ms"]
        parts.append(f"{ratio:.2f}x as fast as dense on {planned['device']} at batch {planned['batch']}, {planned['kind']}")
    for result in latencies:
        verdict = result["verdict"]
        parts.append(
            f"{verdict['ratio']:.2f}x at batch {result['batch']} (99 % interval {verdict['low']:.2f} to {verdict['high']:.2f}, "
            f"{result['dense_ms']['p50']:.1f} to {result['moee_ms']['p50']:.1f} ms)"
        )
    where = ", measured on CPU by ONNX Runtime" if latencies else ""
    return f"speed: {'; '.join(parts)}{where}" if parts else "speed: that of the dense model"


def size_line(cost: dict[str, Any], bytes_dense: int, bytes_moee: int) -> str:
    """The line of the size: MACs, parameters and bytes beside the dense model's."""
    macs, params = (cost["moee"][key] / cost["dense"][key] for key in ("macs", "params"))
    return (
        f"size: {macs:.1%} of the MACs, {params:.1%} of the parameters, weights {bytes_moee / 2**20:.1f} instead of "
        f"{bytes_dense / 2**20:.1f} MiB"
    )


def missed(latencies: list[dict[str, Any]], budget: Budget) -> str:
    """What the timing at the end says against the limit of the latency, which the plan's own timing kept."""
    limit = budget.target_latency_ms
    if limit is None or not latencies or latencies[-1]["moee_ms"]["p50"] <= limit:
        return ""
    return f". In the timing at the end it took {latencies[-1]['moee_ms']['p50']:.2f} ms a batch, above {limit:g} ms"


def choice_line(
    plan: dict[str, Any], winner: dict[str, Any], budget: Budget, *, tuned: str = "", unshipped: str = ""
) -> str:  # fmt: skip
    """What was chosen of a plan's points, and why. `tuned`: what fine-tuning did; `unshipped`: why it is not what is shipped."""
    points = [p for p in plan["points"] if p["method"] != "dense"]
    left = plan.get("left_out", 0)
    counted = f"{len(points)} candidate{'' if len(points) == 1 else 's'}"
    fitted = f". No time was left for {left} further trial{'' if left == 1 else 's'}" if left else ""
    if left and (untried := plan.get("untried")):
        fitted += f"; not tried at all: {named_ways(untried)}"
    if unshipped:
        return f"chosen: the dense model, {unshipped}; {way(winner)} is kept beside it"
    if winner["recipe"] is None:
        kinds = sorted({p["latency"]["kind"] for p in points if p.get("latency")})
        how = (f" ({', '.join(kinds)})" if kinds else "") + fitted
        if not points:
            return f"chosen: the dense model: no candidate could be made: {plan.get('obstacle') or 'the reason is not known'}"
        if not budget.limits_quality:
            return f"chosen: the dense model: it keeps to {described(budget)} itself{how}"
        none = f"none of {counted} is" if len(points) > 1 else "the one candidate is not"
        return f"chosen: the dense model: {none} faster with {described(budget)}{how}"
    others = [p for p in points if p["recipe"] != winner["recipe"]]
    tried = "the one candidate" if not others else f"the best of {counted}"
    faster = plan.get("passed_over")
    if faster and winner["recipe"] == plan["winner"]["recipe"]:
        tried += f" ({named_ways(faster)} measured faster, but within the noise)"
    return f"chosen: {way(winner)}{tuned}: {tried} with {described(budget)}{fitted}"


def last_lines(
    place: StagedFolder, device: str, plan: dict[str, Any], budget: Budget, stage: dict[str, Any] | None, *,
    latencies: list[dict[str, Any]], point: dict[str, Any], tuned: str, unshipped: str,
    confirmation: dict[str, Any] | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """The five lines. `stage`: what was measured of the shipped model, None for the dense one. `latencies` as in `speed_line`;
    `point`, `tuned` and `unshipped` as in `choice_line`; `confirmation` as in `accuracy_line`."""
    planned = point["latency"] if device != CPU and stage is not None else None
    folder, bundle = place.folder("export").place, place.folder("bundle").place
    sizes = [(folder / name).stat().st_size for name in (DENSE_DATA, MOEE_DATA)]
    choice = choice_line(plan, point, budget, tuned=tuned, unshipped=unshipped)
    return (
        accuracy_line(stage["retention"] if stage else None, confirmation, budget.max_drop),
        speed_line(latencies, planned),
        size_line(stage["cost"], sizes[0], sizes[1]) if stage else "size: that of the dense model",
        choice + missed(latencies if device == CPU else [], budget),
        f"bundle: {bundle} (its graphs are the verified export's); report: {place.place / 'report.html'}",
    )


def slower(
    latencies: list[dict[str, Any]], budget: Budget, device: str, planned: dict[str, Any] | None = None
) -> str:
    """Why the model must not be shipped: on the CPU, by the timing at the end, it is not faster beyond the noise, or on another
    device by what the plan says of it (`planned`) not by `MIN_EFFECT`. Empty where the dense model is no answer, since it costs
    more than the budget allows."""
    elsewhere = None if device == CPU else planned
    if device != CPU and elsewhere is None:
        return ""
    limit, dense_ms = budget.target_latency_ms, elsewhere["dense_ms"] if elsewhere else latencies[-1]["dense_ms"]["p50"]
    if budget.target_macs is not None or budget.target_params is not None or (limit is not None and dense_ms > limit):
        return ""
    if elsewhere:
        ratio = elsewhere["dense_ms"] / elsewhere["moee_ms"]
        on = f"on {elsewhere['device']} ({elsewhere['kind']}) it is {ratio:.3f}x as fast"
        return "" if ratio >= 1 + MIN_EFFECT else f"{on}, and a gain below {MIN_EFFECT:.0%} is none"
    verdict = latencies[-1]["verdict"]
    return "" if verdict["winner"] == "moee" else f"the timing at the end says: {verdict['text']}"
