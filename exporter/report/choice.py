"""Which of the files that were found are shown: those of one model. A result of another one never stands beside its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter import belonging
from exporter.report.sources import EXAMPLES, KINDS, PLAN, SELFTEST, Artifact, Sources
from moee.errors import UserError
from moee.store.artifact import read_json
from moee.store.result_kinds import FRONT, family

LATENCY = "moee.latency"
ORDER = ("moee.model", "moee.export", "moee.summary", "moee.parity", LATENCY, "moee.engine", EXAMPLES)
DENSE_MODEL = ("library", "timm_name", "kwargs", "weights_sha256", "random_seed", "pretrained", "input_size", "part")  # of a spec
PATCHES = "patches.svg"  # of a folder of plots, whose examples show the same in the page's own way


def choose(sources: Sources) -> None:
    """Fill `sources.artifacts` with the file that is shown of each kind, and say in `problems` which ones are not, and why.

    Of two models the one with more stages is shown: a tuned model holds the figures of the extracted one. Everything else is
    shown if it belongs to that model and, as far as one is known, its export. Files of before that was recorded are shown with
    a sentence that says so.
    """
    known: dict[str, str] = {}
    first: Artifact | None = None
    for kind in ORDER:
        found = [artifact for artifact in sources.all if artifact.kind == kind]
        if kind == "moee.model":
            found.sort(key=lambda artifact: -len(_stages(artifact)))
        fitting: list[tuple[Artifact, bool | None]] = []
        for artifact in found:
            belongs = belonging.same(known, _ids(artifact)) if first is not None else True
            if belongs is not False:
                fitting.append((artifact, belongs))
                continue
            _doubt(sources, kind, f"{artifact.path} is of another {_differs(known, artifact)}: not shown")
        if not fitting:
            continue
        chosen, belongs = next((pair for pair in fitting if pair[1]), fitting[0])
        sources.artifacts[kind] = chosen
        sources.doubts.pop(kind, None)
        if belongs is None and first is not None:
            together = f"{chosen.path} and {first.path} belong together"
            _doubt(sources, kind, f"it cannot be told whether {together}: an earlier version wrote one, or Python without source")
        if kind == LATENCY:
            sources.latencies = _timings(chosen, [other for other, sure in fitting if sure is belongs])
        for other, _ in fitting:
            if other in sources.latencies:
                continue
            if other is not chosen and not _is_stage_of(other, chosen):
                sources.problems.append(f"{other.path} is not shown: {chosen.path} is; make a report of each")
        known = {**_ids(chosen), **known}
        first = first or chosen
    _choose_plans(sources)
    sources.selftests = [found for found in sources.all if found.kind == SELFTEST and found.version <= KINDS[SELFTEST][0]]
    if sources.selftests:
        sources.artifacts[SELFTEST] = sources.selftests[0]
    _choose_plots(sources, known)


def _timings(chosen: Artifact, found: list[Artifact]) -> list[Artifact]:
    """The timings that are shown: the chosen one, and those of other batches or runtimes, one of each."""
    kinds: dict[tuple[str, str], Artifact] = {}
    for artifact in [chosen, *found]:
        if artifact.version <= KINDS[LATENCY][0]:
            kinds.setdefault((str(artifact.body.get("runtime")), str(artifact.body.get("batch"))), artifact)
    return list(kinds.values())


def _choose_plans(sources: Sources) -> None:
    """Fill `plans` with the plans of the dense model that is shown, or of the first plan's; each may be of another device."""
    shown = sources.body("moee.model") or sources.body("moee.export")
    model = _dense_model(shown) if shown else None
    for plan in sources.all:
        if plan.kind != PLAN or plan.version > KINDS[PLAN][0]:
            continue
        ours = _dense_model(plan.body)
        if model is not None and ours is not None and _differ(model, ours):
            _doubt(sources, PLAN, f"{plan.path} is a plan of another model: not shown")
            continue
        if shown is not None and (model is None or ours is None):
            sources.problems.append(f"it cannot be told whether {plan.path} is a plan of the model that is shown")
        model = model or ours
        sources.plans.append(plan)
        sources.artifacts.setdefault(PLAN, plan)
    if sources.plans:
        sources.doubts.pop(PLAN, None)


def _dense_model(body: dict[str, Any]) -> dict[str, Any] | None:
    """What tells the dense model of a manifest from another one; None where it does not say."""
    spec = body.get("model")
    if not isinstance(spec, dict) or not spec.get("timm_name"):
        return None
    return {key: spec.get(key) for key in DENSE_MODEL}


def _choose_plots(sources: Sources, known: dict[str, str]) -> None:
    """Leave out the plots that are of another model, by the figures beside them."""
    unknown = []
    for path in list(sources.plots):
        if _drawn_by_page(path, sources):
            sources.plots.remove(path)
            continue
        belongs = belonging.same(known, _beside(path)) if known else None
        if belongs is False:
            sources.plots.remove(path)
            sources.problems.append(f"{path} is of another model: not shown")
        elif belongs is None:
            unknown.append(path)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        sources.problems.append(f"it cannot be told which model the plot {unknown[0]}{more} is of: nothing beside it says it")


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two dense models are not the same, by what both say."""
    return any(one[key] != other[key] for key in DENSE_MODEL if one[key] is not None and other[key] is not None)


def _drawn_by_page(plot: Path, sources: Sources) -> bool:
    """Whether the page draws what a plot shows from the figures themselves: a plan's front, and the patches of the experts."""
    beside = family(_figures(plot))
    examples = sources.artifacts.get(EXAMPLES)
    return beside == FRONT.schema or (plot.name == PATCHES and examples is not None and plot.parent == examples.folder)


def _beside(plot: Path) -> dict[str, str]:
    """What the figures of a plot say that it belongs to."""
    return belonging.recorded(_figures(plot))


def _figures(plot: Path) -> dict[str, Any]:
    """The figures of a plot, which `moee plots` writes beside it; empty where there are none."""
    figures = plot.with_suffix(".json")
    try:
        body = read_json(figures) if figures.is_file() else None
    except UserError:
        return {}
    return body if isinstance(body, dict) else {}


def _doubt(sources: Sources, kind: str, text: str) -> None:
    sources.problems.append(text)
    sources.doubts[kind] = text


def _ids(artifact: Artifact) -> dict[str, str]:
    if artifact.kind == "moee.model":
        return belonging.artifact_ids(artifact.body)
    return belonging.export_ids(artifact.body) if artifact.kind == "moee.export" else belonging.recorded(artifact.body)


def _differs(known: dict[str, str], artifact: Artifact) -> str:
    """What an artifact is another one of: the model, or the export of the same model."""
    ids = _ids(artifact)
    return "model" if known.get(belonging.ARTIFACT) != ids.get(belonging.ARTIFACT, known.get(belonging.ARTIFACT)) else "export"


def _is_stage_of(other: Artifact, chosen: Artifact) -> bool:
    """Whether one model is a former stage of another, whose manifest holds its figures, and what was added to them since."""
    before, after = _stages(other), _stages(chosen)
    return bool(before) and before != after and all(_holds(after.get(name), stage) for name, stage in before.items())


def _holds(later: Any, stage: Any) -> bool:
    if not isinstance(later, dict) or not isinstance(stage, dict):
        return bool(later == stage)
    return all(key in later and later[key] == value for key, value in stage.items())


def _stages(artifact: Artifact) -> dict[str, Any]:
    info = artifact.body.get("info")
    stages = info.get("stages") if isinstance(info, dict) else None
    return stages if isinstance(stages, dict) else {}
