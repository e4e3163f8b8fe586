"""Ablation of CLEAR-MoE: a grid of settings, one JSON file a cell, mean and standard deviation over seeds.

A cell is written atomically and skipped if it is there, so an interrupted run goes on. The `star` design varies one factor at a
time around a centre; `full` takes every combination.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moee.config import validated
from moee.errors import OptionError, UserError
from moee.measure.accuracy import seeds_interval
from moee.methods.clear_moe.convert import convert
from moee.methods.clear_moe.options import ClearOptions
from moee.methods.recipe import Recipe
from moee.migrations import recipe_of
from moee.places.output_file import OutputFile
from moee.places.output_folder import OutputFolder
from moee.places.resume import check_identity, difference, fingerprints
from moee.progress import Reporter, silent
from moee.schema import Body, checked
from moee.stages.identity import named_identity
from moee.stages.session import Session
from moee.store.artifact import read_json, write_json
from moee.store.result_kinds import CLEAR_ABLATION, CLEAR_PLOT_TITLE

SETUP, SETUP_SCHEMA, SCHEMA = "setup.json", "moee.clear-setup/1", "moee.clear-cell/1"
FACTORS = ("router", "rank", "experts", "calibration_images")
METRICS = ("accuracy", "class_cosine", "token_cosine")


class StoredCell(Body):
    """A cell's file; accuracies lack without labels."""

    schema_: Literal["moee.clear-cell/1"] = Field(alias="schema")
    setting: dict[str, Any]
    config: dict[str, Any]
    dense_accuracy: float | None
    accuracy: float | None
    class_cosine: float
    token_cosine: float | None
    macs_share: float
    router_accuracy: float
    seconds: float
    labelled: int | None = None
    no_accuracy: str = ""


@dataclass(frozen=True)
class Grid:
    """Values of each factor; `centre` holds the setting that a star varies. Ranks are shared + residual rank together."""

    router: tuple[str, ...] = ("random", "linear", "mlp", "centroid")
    rank: tuple[int, ...] = (96, 128, 176)
    experts: tuple[int, ...] = (2, 4, 8)
    calibration_images: tuple[int, ...] = (50, 200, 500)
    seeds: int = 3
    residual_rank: int = 16
    tokens: int = 16_384
    centre: tuple[tuple[str, Any], ...] = (("router", "linear"), ("rank", 128), ("experts", 4), ("calibration_images", 200))

    def settings(self, design: str) -> list[dict[str, Any]]:
        """One dict a setting, without seeds. Raises `UserError` for an unknown design."""
        centre = dict(self.centre)
        if design == "full":
            values = [getattr(self, name) for name in FACTORS]
            return [dict(zip(FACTORS, combination, strict=True)) for combination in itertools.product(*values)]
        if design != "star":
            raise UserError(f"unknown design {design!r}; expected star or full")
        found = [centre]
        for name in FACTORS:
            found += [{**centre, name: value} for value in getattr(self, name) if value != centre[name]]
        return found

    def check(self, design: str) -> None:
        """Raise `UserError` for a setting that cannot be run."""
        for setting in self.settings(design):
            try:
                self.config(setting, 0)
            except OptionError as error:  # whose option takes one value, and that of a grid several
                flag = f"--{error.option.replace('_', '-')}"
                listed = {"--router": "--routers", "--rank": "--ranks"}.get(flag, flag)
                raise OptionError(str(error).replace(f"{flag}:", f"{listed}:"), error.option) from error

    def config(self, setting: dict[str, Any], seed: int) -> ClearOptions:
        """The configuration of a cell."""
        values = {
            **setting, "rank": setting["rank"] - self.residual_rank, "residual_rank": self.residual_rank, "seed": seed,
            "tokens": self.tokens, "score": False,
        }  # fmt: skip
        return validated(ClearOptions, values)


def cell_name(setting: dict[str, Any], seed: int) -> str:
    return "-".join([*(f"{setting[name]}" for name in FACTORS), f"s{seed}"])


def run_cell(session: Session, probe: Any, config: ClearOptions, setting: dict[str, Any]) -> dict[str, Any]:
    """Convert, measure on the held-out images, and describe the result."""
    model = copy.deepcopy(session.dense)
    started = time.perf_counter()
    layers = convert(model, session.train, config, device=session.group.device)
    seconds = time.perf_counter() - started
    measured = session.measure(model.eval(), probe, "held-out images")
    kept, cost = measured["retention"], measured["cost"]
    accuracy = [r.router_accuracy for r in layers if r.router_accuracy is not None]
    return {
        "schema": SCHEMA,
        "setting": setting,
        "config": config.model_dump(mode="json"),
        **{name: kept[name] for name in ("dense_accuracy", *METRICS, "labelled", "no_accuracy")},
        "macs_share": cost["moee"]["macs"] / cost["dense"]["macs"],
        "router_accuracy": statistics.fmean(accuracy),
        "seconds": seconds,
    }


def stored_cell(path: Path, grid: Grid, setting: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """A finished cell; None if it was not run yet. Raises `UserError` for one that is damaged or of another configuration."""
    if not path.is_file():
        return None
    cell: dict[str, Any] = read_json(path)
    checked(StoredCell, cell, path)
    other = difference({"setting": cell["setting"]}, {"setting": setting})
    config = cell.get("config") or {}
    if "method" in config:  # of before recipes
        config = {name: value for name, value in recipe_of(config)["steps"][-1].items() if name != "method"}
    other = other or difference(config, grid.config(setting, seed).model_dump(mode="json"))
    if other is not None:
        name, stored, ours = other
        raise UserError(f"{path} was made with {name} {stored!r}, now {ours!r}; give another --out or remove it")
    return cell


def ablate(
    session: Session, grid: Grid, design: str, out: Path | str, report: Reporter = silent
) -> list[dict[str, Any]]:
    """Run what is missing of the grid into folder `out`; returns all cells. Seeds are the outer loop, so that an early stop
    leaves every setting measured once."""
    out = Path(out)
    grid.check(design)
    OutputFolder(out, CLEAR_ABLATION, grows=True).check()
    out.mkdir(parents=True, exist_ok=True)
    model = named_identity(session)
    images = dict(zip(("images", "held_out_images"), fingerprints(session.train, session.held_out, report), strict=True))
    check_identity(
        out / SETUP, SETUP_SCHEMA, {**model, **images}, "an ablation",
        "its cells do not go together, choose another --out or remove it", said={"data": session.source},
    )  # fmt: skip
    jobs = [(setting, seed) for seed in range(grid.seeds) for setting in grid.settings(design)]
    stored = {name: cell for job in jobs if (cell := stored_cell(out / (name := f"{cell_name(*job)}.json"), grid, *job))}
    probe = None
    cells = []
    for done, (setting, seed) in enumerate(jobs):
        report("ablation", done, len(jobs))
        path = out / f"{cell_name(setting, seed)}.json"
        config = grid.config(setting, seed)
        if path.name in stored:
            cell = stored[path.name]
        else:
            session.prove(Recipe.of(config))
            probe = probe or session.probe()
            cell = run_cell(session, probe, config, setting)
            write_json(path, cell)
        cells.append(cell)
    report("ablation", len(jobs), len(jobs))
    return cells


def spread(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation (0 for one value); None if nothing was measured."""
    known = [v for v in values if v is not None]
    return (statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0) if known else None


def summarise(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a setting: mean and standard deviation over seeds, in the order of first appearance."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        rows.setdefault(json.dumps(cell["setting"]), []).append(cell)
    names = (*METRICS, "router_accuracy", "macs_share", "dense_accuracy")
    return [
        {
            "setting": group[0]["setting"], "seeds": len(group), **{n: spread(c[n] for c in group) for n in names},
            "accuracy_interval": seeds_interval(group, "accuracy"), "no_accuracy": group[0].get("no_accuracy", ""),
        }  # fmt: skip
        for group in rows.values()
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of a summary."""

    def cell(value: tuple[float, float] | None, scale: float, digits: int) -> str:
        return "–" if value is None else f"{value[0] * scale:.{digits}f} ± {value[1] * scale:.{digits}f}"

    lines = [  # after an accuracy its 95 % interval
        "| router | rank | experts | images | seeds | MACs | accuracy % | class cosine | token cosine | router accuracy % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        s, interval = row["setting"], row["accuracy_interval"]
        within = f" ({interval[0] * 100:.1f} to {interval[1] * 100:.1f})" if interval else ""
        share = row["macs_share"]
        lines.append(
            f"| {s['router']} | {s['rank']} | {s['experts']} | {s['calibration_images']} | {row['seeds']} | "
            f"{(share[0] - 1) * 100:+.1f} % | {cell(row['accuracy'], 100, 2)}{within} | "
            f"{cell(row['class_cosine'], 1, 5)} | {cell(row['token_cosine'], 1, 5)} | {cell(row['router_accuracy'], 100, 1)} |"
        )
    why = next((row["no_accuracy"] for row in rows if row["no_accuracy"]), "")
    return "\n".join([*lines, *(["", f"Accuracy is not compared: {why}."] if why else [])]) + "\n"


def plot(rows: list[dict[str, Any]], grid: Grid, place: OutputFile) -> bool:
    """Class cosine over each factor's values around the centre, as SVG; False if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    centre = dict(grid.centre)
    figure, axes = pyplot.subplots(1, len(FACTORS), figsize=(12, 3), sharey=True)
    for axis, name in zip(axes, FACTORS, strict=True):
        found = [r for r in rows if all(r["setting"][o] == centre[o] for o in FACTORS if o != name)]
        found.sort(key=lambda r: getattr(grid, name).index(r["setting"][name]))  # noqa: B023
        labels = [str(r["setting"][name]) for r in found]
        means, deviations = zip(*[r["class_cosine"] for r in found], strict=True)
        axis.errorbar(labels, means, yerr=deviations, marker="o", capsize=3)
        axis.set_xlabel(name.replace("_", " "))
    axes[0].set_ylabel("class cosine to dense")
    figure.tight_layout()
    with place.write() as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Title": CLEAR_PLOT_TITLE})
    pyplot.close(figure)
    return True
