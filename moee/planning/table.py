"""The table of methods: each at the same shares of MACs on several models and domains, from one plan a row.

A row is what `moee plan` makes by the command that the page names; its folder is kept, and a row that is there is not made again.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moee.errors import UserError
from moee.measure.accuracy import counted
from moee.planning.budget import Budget
from moee.planning.plan import PLAN, SCHEMA, make_plan
from moee.planning.search import ALLOCATIONS, variants
from moee.progress import Reporter, silent
from moee.stages.session import Session
from moee.store.artifact import read_manifest
from moee.store.atomic import write_text

TARGETS = (0.8, 0.65, 0.5)  # shares of the dense MACs
NEAR = 0.03  # of them: what is further from a target than experts that are whole numbers make it stands in no row
LEAST = 1e-6  # the cosine that is asked of a row's plan: every point counts, however bad
SCALE = {"tokens": 16_384, "cluster_tokens": 6000, "refit_tokens": 16_384, "sensitivity_tokens": 8192}  # of a layer
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
    plans = [(row, plan) for row in ROWS if (plan := made(case, row, work)) is not None]
    if not plans:
        return ""
    known = plans[0][1]
    dense = next(point for point in known["points"] if point["method"] == "dense")
    measured = known["accuracy"]
    right = "" if dense["accuracy"] is None else f"Dense accuracy {_accuracy(dense)}, of " + counted(
        measured["labelled"], measured["images"], measured["probe"]
    ) + "."  # fmt: skip
    lines = [f"## {case.model} on {case.data}", "", " ".join(filter(None, [case.about, right])), ""]
    head = "| budget | method | MACs | parameters | class cosine | accuracy (95 % interval) | plugin |"
    lines += [head, "|---|---|---|---|---|---|---|"]
    for target in TARGETS:
        points = [(row, point) for row, plan in plans for point in _at(target, plan)]
        best = max((point["cosine"] for _, point in points if point["cosine"] is not None), default=None)
        for row, point in sorted(points, key=lambda cell: -_number(cell[1]["cosine"])):
            cosine = "no number" if point["cosine"] is None else f"{point['cosine']:.4f}"
            cells = (
                _change(target, 0), row.called[point["allocation"]], _change(point["macs"]), _change(point["params"]),
                f"**{cosine}**" if point["cosine"] == best else cosine, _accuracy(point),
                "yes" if variants()[row.method][0].plugin else "no",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    for row in ROWS:
        if why := refused(case, row, work):
            lines.append(f"\n{', '.join(row.called.values())}: not made. {why}")
    lines += ["", "By these commands:", "", *(f"    {row.command(case.model, case.data)}" for row, _ in plans), ""]
    return "\n".join(lines)


def _at(target: float, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The points of a plan that were made for a target: for each way the nearest."""
    ways = {point["allocation"] for point in plan["points"] if point["method"] != "dense"}
    found = []
    for way in sorted(ways):
        points = [point for point in plan["points"] if point["method"] != "dense" and point["allocation"] == way]
        nearest = min(points, key=lambda point: abs(point["macs"] - target))
        if abs(nearest["macs"] - target) <= NEAR:
            found.append(nearest)
    return found


def _change(share: float, digits: int = 1) -> str:
    """A share of dense as the change from it."""
    return f"{100 * (share - 1):+.{digits}f} %".replace("-", "−")


def _number(cosine: float | None) -> float:
    return -2.0 if cosine is None else cosine


def _accuracy(point: dict[str, Any]) -> str:
    if point["accuracy"] is None:
        return "–"
    low, high = point["accuracy_interval"]
    return f"{100 * point['accuracy']:.2f} % ({100 * low:.1f} to {100 * high:.1f})"
