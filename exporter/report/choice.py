"""Which of the files that were found are shown: those of one model. A result of another one never stands beside its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter import belonging
from exporter.report.sources import Artifact, Sources
from moee.errors import UserError
from moee.store.artifact import read_json

ORDER = ("moee.model", "moee.export", "moee.summary", "moee.parity", "moee.latency", "moee.engine")


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
        for other, _ in fitting:
            if other is not chosen and not _is_stage_of(other, chosen):
                sources.problems.append(f"{other.path} is not shown: {chosen.path} is; make a report of each")
        known = {**_ids(chosen), **known}
        first = first or chosen
    _choose_plots(sources, known)


def _choose_plots(sources: Sources, known: dict[str, str]) -> None:
    """Leave out the plots that are of another model, by the figures beside them."""
    unknown = []
    for path in list(sources.plots):
        belongs = belonging.same(known, _beside(path)) if known else None
        if belongs is False:
            sources.plots.remove(path)
            sources.problems.append(f"{path} is of another model: not shown")
        elif belongs is None:
            unknown.append(path)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        sources.problems.append(f"it cannot be told which model the plot {unknown[0]}{more} is of: nothing beside it says it")


def _beside(plot: Path) -> dict[str, str]:
    """What the figures of a plot, which `moee plots` writes beside it, say that it belongs to."""
    figures = plot.with_suffix(".json")
    try:
        body = read_json(figures) if figures.is_file() else None
    except UserError:
        return {}
    return belonging.recorded(body) if isinstance(body, dict) else {}


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
