"""Running the cells: one JSON file a configuration, written atomically, so that an interrupted ablation goes on where it was."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from moee.ablation.grid import AblationConfig, Cell, cells_of
from moee.calibrate.calibration import LayerTokens, collect_tokens
from moee.config import Options
from moee.errors import NothingRouted, UserError
from moee.measure.probe import Probe
from moee.methods.recipe import Recipe, read_recipe_json
from moee.mlps.find import find_ffns
from moee.places.output_folder import OutputFolder
from moee.places.resume import check_identity, compare_identity, fingerprints
from moee.progress import Reporter, silent
from moee.stages.identity import named_identity
from moee.stages.session import Session
from moee.store.artifact import read_json, write_json
from moee.store.cache import tensor_hash
from moee.store.leftovers import sweep_all
from moee.store.result_kinds import ABLATION
from moee.store.scratch import sweep_scratch, temporary_folder

log = logging.getLogger("moee")
CELLS, SETUP = "cells", "setup.json"
SETUP_SCHEMA, CELL_SCHEMA = "moee.ablation-setup/1", "moee.ablation-cell/2"
WORST = -1.0  # of a cosine
RETAINED = ("dense_accuracy", "accuracy", "top1_agreement", "class_cosine", "token_cosine", "labelled", "no_accuracy")


def cell_key(options: Options) -> str:
    """Name of the result file of a method's options."""
    return tensor_hash(extra=json.dumps(Recipe.of(options).to_json()))[:16]


class CellResult(BaseModel):
    """What a cell's file holds as its result. Changes are relative to the dense model; figures lack where all layers stayed
    dense, accuracies also where they cannot be compared: `no_accuracy` says why. They are of `labelled` images."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    status: Literal["routed", "dense"]
    seconds: float
    dense_accuracy: float | None = None
    accuracy: float | None = None
    top1_agreement: float | None = None
    class_cosine: float | None = None
    token_cosine: float | None = None
    macs_change: float | None = None
    params_change: float | None = None
    experts: list[int] = []
    noise: float | None = None
    labelled: int | None = None
    no_accuracy: str = ""

    @model_validator(mode="after")
    def _complete(self) -> CellResult:
        if self.status == "routed" and (self.macs_change is None or self.class_cosine is None):
            raise ValueError("a routed cell has MACs and a cosine")
        return self


CURE = "its cells do not go together, choose another --out or pass --force to replace it"


def read_cells(out: Path) -> dict[str, dict[str, Any]]:
    """Finished cells of an ablation folder by key; a file that is damaged or under a foreign name counts as not run."""
    found = {}
    for path in sorted((out / CELLS).glob("*.json")):
        try:
            cell = read_json(path)
            if cell["schema"] == CELL_SCHEMA and cell_key(read_recipe_json(cell["recipe"], path).cut) == path.stem:
                found[path.stem] = CellResult(**cell["result"]).model_dump()
        except (UserError, ValidationError, KeyError, TypeError):
            continue
    return found


def check_setup(out: Path, setup: dict[str, Any]) -> None:
    """Write `setup.json`, or hold it against the one that is there. Where the images lie may have changed.

    Raises `UserError` that names the first difference, or if `out` holds something else.
    """
    OutputFolder(out, ABLATION, grows=True).check()
    same = {name: value for name, value in setup.items() if name != "data"}
    check_identity(out / SETUP, SETUP_SCHEMA, same, "an ablation", CURE, said={"data": setup["data"]})


def setup_of(session: Session, ablation: AblationConfig, report: Reporter = silent) -> dict[str, Any]:
    """What decides every cell besides its own configuration."""
    images = dict(zip(("images", "held_out_images"), fingerprints(session.train, session.held_out, report), strict=True))
    return {**_told(session, ablation), "data": session.source, **images}


def _told(session: Session, ablation: AblationConfig) -> dict[str, Any]:
    """What of the set-up is known without reading an image."""
    return {**named_identity(session), **ablation.shared()}


def fitting_cells(session: Session, ablation: AblationConfig) -> tuple[list[Cell], dict[str, str]]:
    """The cells whose method can cut the session's model, and why others cannot, by row. Raises the reason where none can."""
    fitting, left_out, refused = [], dict[str, str](), None
    for cell in cells_of(ablation):
        if cell.row in left_out:
            continue
        try:
            Recipe.of(cell.options).method.check(session.dense, session.transform.shape, cell.options)
        except UserError as error:
            left_out[cell.row], refused = str(error).partition(";")[0], refused or error  # a cure may be no flag of an ablation
        else:
            fitting.append(cell)
    if refused is not None and not fitting:
        raise refused
    for row, reason in left_out.items():
        log.warning("row %r is left out: %s", row, reason)
    return fitting, left_out


def run_cells(
    session: Session, ablation: AblationConfig, cells: Sequence[Cell], out: Path, report: Reporter = silent
) -> list[tuple[Cell, dict[str, Any]]]:
    """Run what is missing of the ablation's `cells` in `out`; returns every one with its result, in order.

    Calibration tokens are collected once (with seed 0); a cell's seed draws the tokens that are clustered and starts whatever
    is random. A cell whose layers all stay dense has status "dense" and no figures. Raises `UserError` when `out` holds
    another configuration.
    """
    compare_identity(out / SETUP, SETUP_SCHEMA, _told(session, ablation), "an ablation", CURE)
    check_setup(out, setup_of(session, ablation, report))
    sweep_scratch()  # a run that finds every cell finished makes no scratch folder of its own
    (out / CELLS).mkdir(exist_ok=True)
    sweep_all(out / CELLS)
    finished = read_cells(out)
    missing = {key: cell for cell in cells if (key := cell_key(cell.options)) not in finished}
    if missing:
        session.prove(Recipe.of(next(iter(missing.values())).options))
        probe, _ = session.probe(), session.reference
        quiet = copy.copy(session)  # shares the dense outputs; a cell's own steps are not reported
        quiet.report = silent
        with temporary_folder() as folder:
            ffns = find_ffns(session.dense, gated=True).ffns  # of every cell
            sampled = collect_tokens(
                session.dense, ffns, session.train, folder, ablation.tokens, seed=0, report=report, group=session.group
            )
            report("cells", 0, len(missing))  # of what is missing: finished ones would spoil the estimate of what is left
            for done, (key, cell) in enumerate(missing.items(), 1):
                finished[key] = run_cell(quiet, cell.options, sampled, probe)
                body = {"schema": CELL_SCHEMA, "recipe": Recipe.of(cell.options).to_json(), "result": finished[key]}
                write_json(out / CELLS / f"{key}.json", body)
                report("cells", done, len(missing))
    return [(cell, finished[cell_key(cell.options)]) for cell in cells]


def run_cell(session: Session, options: Options, sampled: list[LayerTokens], probe: Probe | None) -> dict[str, Any]:
    """Extract and measure by one method's options: retention, MACs and parameters relative to the dense model, seconds."""
    model = copy.deepcopy(session.dense)
    started = time.perf_counter()
    try:
        layers = Recipe.of(options).method.convert(model, options, session.context(sampled=sampled))
    except NothingRouted:
        return CellResult(status="dense", seconds=time.perf_counter() - started).model_dump()
    seconds = time.perf_counter() - started
    measured = session.measure(model, probe, "")
    dense, ours = measured["cost"]["dense"], measured["cost"]["moee"]
    kept = measured["retention"]
    for key in ("class_cosine", "token_cosine"):
        if kept[key] is not None and not math.isfinite(kept[key]):
            kept[key] = WORST  # a model that gives no numbers loses its comparisons, and is not left out of them
    cut = [layer for layer in layers if layer.candidate]
    return CellResult(
        status="routed",
        seconds=seconds,
        **{name: kept[name] for name in RETAINED},
        macs_change=ours["macs"] / dense["macs"] - 1,
        params_change=ours["params"] / dense["params"] - 1,
        experts=[layer.experts for layer in cut],
        noise=sum(layer.noise for layer in cut) / len(cut),
    ).model_dump()
