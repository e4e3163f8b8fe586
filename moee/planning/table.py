"""The table of methods: each at the same shares of MACs on several models and domains, from one plan a row.

A row is what `moee plan` makes by the command that the page names; its folder is kept, and a row that is there is not made again.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moee.errors import UserError
from moee.measure.accuracy import counted
from moee.places.output_folder import resume_folder
from moee.planning.budget import Budget, checked_point
from moee.planning.plan import IDENTITY, PLAN, SCHEMA, make_plan
from moee.planning.search import ALLOCATIONS, variants
from moee.progress import Reporter, silent
from moee.stages.session import Session
from moee.store.artifact import read_json, read_manifest
from moee.store.atomic import write_text
from moee.store.result_kinds import PLAN_STATE

TARGETS = (0.8, 0.65, 0.5)  # shares of the dense MACs
NEAR = 0.03  # of them: what is further from a target than experts that are whole numbers make it stands in no row
LEAST = 1e-6  # the cosine that is asked of a row's plan: every point counts, however bad
SCALE = {  # of a layer; widths of any number of neurons, since time is none of the columns
    "tokens": 16_384, "cluster_tokens": 6000, "refit_tokens": 16_384, "sensitivity_tokens": 8192, "width_multiple": 1,
}  # fmt: skip
REFUSED = ".refused"  # a file beside a row's folder: why the method cannot cut the model


@dataclass(frozen=True)
class Row:
    """The plan of one method: a variant, the ways in which it spends its budget with the name of each in the table, and options
    beside those of the `SCALE`."""

    name: str
    method: str
    called: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> dict[str, Any]:
        """The options of all of its points, of those that its method knows."""
        known = variants()[self.method][0].options.model_fields
        return {name: value for name, value in {**SCALE, **self.options}.items() if name in known}

    @property
    def allocations(self) -> tuple[str, ...]:
        """Those that a plan is told; a method that has ways of its own takes them."""
        return tuple(name for name in self.called if name in ALLOCATIONS)

    def command(self, model: str, data: str) -> str:
        """The line that makes it."""
        words = ["moee", "plan", model, "--data", data, "--methods", self.method]
        if self.allocations:
            words += ["--allocations", ",".join(self.allocations)]
        words += ["--targets", ",".join(map(str, TARGETS)), "--min-cosine", "0.000001"]
        for name, value in self.base.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join([*words, "--out", "DIR"])


ROWS = (
    Row("static", "static", {"share": "static pruning, equal shares", "sensitivity": "static pruning, by sensitivity"}),
    Row("lowrank", "lowrank", {"ranks": "low-rank maps"}),
    Row("tokens", "tokens", {"": "merged tokens"}),
    Row("corp", "corp", {"equal": "CORP"}),
    Row(
        "criteria-alone", "static", {"weight": "magnitude of the weights, no refit", "taylor": "Taylor, no refit"},
        {"compensation": "none"},
    ),
    Row("experts", "kmeans-8", {"sensitivity": "8 experts, by sensitivity"}),
    Row("clear-moe", "clear-moe", {"ranks": "CLEAR-MoE"}),
    Row("moefication", "moefication", {"top-k": "MoEfication, 32 experts"}),
    Row("eliminated", "static", {"sensitivity": "static pruning, elimination"}, {"neurons": "eliminated"}),
    Row(
        "criteria", "static",
        {"weight": "magnitude of the weights, refit", "taylor": "Taylor, refit", "atomic": "HEAPr's criterion, refit"},
    ),
    Row("experts-eliminated", "kmeans-8", {"sensitivity": "8 experts, elimination"}, {"neurons": "eliminated"}),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model on a domain. `about` is a sentence for the page."""

    model: str
    data: str
    about: str = ""

    def folder(self, work: Path, row: Row) -> Path:
        return work / f"{self.model}-{self.data.replace(':', '-')}" / row.name


def made(case: Case, row: Row, work: Path) -> dict[str, Any] | None:
    """The plan of a row, None where it was not made, or with other options. Raises `UserError` for a damaged one."""
    folder = case.folder(work, row)
    if not (folder / PLAN).is_file():
        return None
    plan = read_manifest(folder, PLAN, SCHEMA)
    same = (plan["base"], plan["data"], plan["model"]["name"]) == (row.base, case.data, case.model)
    return plan if same else None


def begun(case: Case, row: Row, work: Path) -> list[dict[str, Any]] | None:
    """The points of a row that was interrupted; None where nothing was begun, or with other options."""
    store = resume_folder(case.folder(work, row), PLAN_STATE).place
    if not (store / IDENTITY).is_file():
        return None
    told = read_json(store / IDENTITY)
    if (told.get("base"), told.get("data"), told.get("model", {}).get("name")) != (row.base, case.data, case.model):
        return None
    files = [path for path in sorted(store.glob("*.json")) if path.name != IDENTITY]
    bodies = [(path, body) for path in files if (body := read_json(path)) is not None]
    return [asdict(checked_point(body, path)) for path, body in bodies]


def refused(case: Case, row: Row, work: Path) -> str:
    """Why a row cannot be made; empty where nothing is known against it."""
    file = case.folder(work, row).with_name(row.name + REFUSED)
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def fill(
    case: Case, rows: Iterable[Row], work: Path, session: Callable[[], Session], *, over: Callable[[], bool] = lambda: False,
    report: Reporter = silent,
) -> bool:  # fmt: skip
    """Make the rows that `work` lacks, one after another until `over` says that the time is; whether it came to the end. The
    `session` is opened for the first of them. What an interrupted row has made is kept and gone on from."""
    opened: Session | None = None
    for row in rows:
        if made(case, row, work) is not None or refused(case, row, work):
            continue
        if over():
            return False
        opened = opened or session()
        out = case.folder(work, row)
        if begun(case, row, work) is None:
            resume_folder(out, PLAN_STATE).remove()  # of other options
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            make_plan(
                opened, Budget(min_cosine=LEAST), out, methods=(row.method,), allocations=row.allocations or ALLOCATIONS,
                targets=TARGETS, base=row.base, force=True, report=report,
            )  # fmt: skip
        except UserError as error:
            write_text(out.with_name(row.name + REFUSED), str(error))
    return True


def page(cases: Sequence[Case], work: Path, header: str) -> str:
    """The page as Markdown: of what was made, a table for each case."""
    return "\n".join([header, *(text for case in cases if (text := _section(case, work)))]) + "\n"


def _section(case: Case, work: Path) -> str:
    whole = {row.name: plan for row in ROWS if (plan := made(case, row, work)) is not None}
    found = [(row, whole[row.name]["points"] if row.name in whole else begun(case, row, work)) for row in ROWS]
    rows = [(row, points) for row, points in found if points]
    if not rows:
        return ""
    right = _dense(next(iter(whole.values()))) if whole else ""
    lines = [f"## {case.model} on {case.data}", "", " ".join(filter(None, [case.about, right])), ""]
    head = "| budget | method | MACs | parameters | class cosine | accuracy (95 % interval) | plugin |"
    lines += [head, "|---|---|---|---|---|---|---|"]
    for target in TARGETS:
        points = [(row, point) for row, made_of in rows for point in _at(target, made_of)]
        best = max((point["cosine"] for _, point in points if point["cosine"] is not None), default=None)
        for row, point in sorted(points, key=lambda cell: -_number(cell[1]["cosine"])):
            cosine = _cosine(point["cosine"])
            cells = (
                _change(target, 0), row.called[point["allocation"]], _change(point["macs"]), _change(point["params"]),
                f"**{cosine}**" if cosine == _cosine(best) else cosine, _accuracy(point),
                "yes" if variants()[row.method][0].plugin else "no",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    if far := [f"{row.called[p['allocation']]} {_change(p['macs'])}: cosine {_cosine(p['cosine'])}, {_accuracy(p)}"
               for row, made_of in rows for p in made_of if _stands_nowhere(p)]:  # fmt: skip
        lines.append(f"\nMade too, but more than {100 * NEAR:.0f} points from a budget: {'; '.join(far)}.")
    for row in ROWS:
        if why := refused(case, row, work):
            lines.append(f"\n{', '.join(row.called.values())}: not made. {why}")
    lines += ["", "By these commands:", "", *(f"    {row.command(case.model, case.data)}" for row, _ in rows), ""]
    return "\n".join(lines)


def _dense(plan: dict[str, Any]) -> str:
    """A sentence about the dense model's accuracy; empty where that is not known."""
    point, measured = next(p for p in plan["points"] if p["method"] == "dense"), plan["accuracy"]
    if point["accuracy"] is None:
        return ""
    return f"Dense accuracy {_accuracy(point)}, of {counted(measured['labelled'], measured['images'], measured['probe'])}."


def _stands_nowhere(point: dict[str, Any]) -> bool:
    """Whether a point is too far from every target to stand in a row of it."""
    return point["method"] != "dense" and all(abs(point["macs"] - target) > NEAR for target in TARGETS)


def _at(target: float, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a row's points those that were made for a target: for each way the nearest."""
    cut = [point for point in points if point["method"] != "dense"]
    found = []
    for way in sorted({point["allocation"] for point in cut}):
        nearest = min((point for point in cut if point["allocation"] == way), key=lambda point: abs(point["macs"] - target))
        if abs(nearest["macs"] - target) <= NEAR:
            found.append(nearest)
    return found


def _change(share: float, digits: int = 1) -> str:
    """A share of dense as the change from it."""
    return f"{100 * (share - 1):+.{digits}f} %".replace("-", "−")


def _cosine(cosine: float | None) -> str:
    return "no number" if cosine is None else f"{cosine:.5f}"


def _number(cosine: float | None) -> float:
    return -2.0 if cosine is None else cosine


def _accuracy(point: dict[str, Any]) -> str:
    if point["accuracy"] is None:
        return "–"
    low, high = point["accuracy_interval"]
    return f"{100 * point['accuracy']:.2f} % ({100 * low:.1f} to {100 * high:.1f})"
