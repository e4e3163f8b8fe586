"""The command `extract` as a function: load, cut, measure against the dense model, save."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moee.artifacts.inspection import attention_figures
from moee.artifacts.model import MoeeModel
from moee.config import Options
from moee.methods.recipe import Recipe
from moee.models.model import ModelSpec, sharing
from moee.parallel.devices import title_of
from moee.parallel.group import SOLO, Group
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder
from moee.progress import Reporter, silent
from moee.stages.planned import Planned
from moee.stages.results import kept, measured, save
from moee.stages.session import Session, Trial
from moee.store.result_kinds import MODEL


def run_extract(
    spec: ModelSpec, source: str, recipe: Recipe | Options, out: Path | str | None, *, force: bool = False,
    report: Reporter = silent, session: Session | None = None, jobs: int = 1, group: Group = SOLO, workers: int = 0,
    classes: Sequence[str] = (), trial: Trial | None = None, memory: int | None = None, among: int = 0,
    planned: Planned | None = None,
) -> MoeeModel:  # fmt: skip
    """`moee extract`: cut the model of `spec` by a recipe, or by the options of its one step, on the training images of
    `source`, and save the artifact.

    In a `group` (a `session` has its own) the ranks share the work and rank 0 writes; the experts do not depend on the number
    of ranks. Probe and measurements are rank 0's alone. Raises `UserError` for bad input; nothing is written then. Where
    measuring the model fails or is interrupted, the artifact is written without measurements, and the error has a note that
    says so. Without `out` nothing is written at all. `among`: models that this one was chosen from by the same held-out images;
    `planned`: what the plan that the recipe comes from says of its images.
    """
    recipe, inputs = Recipe.of(recipe), source_paths(source, spec.weights)
    group = group if session is None else session.group
    with group.agreed():
        if group.leader and out is not None:
            OutputFolder(out, MODEL, force, inputs).check()
    given, session = session, session or Session(
        spec, source, seed=recipe.seed, report=report, group=group, workers=workers, classes=classes, trial=trial,
        memory=memory,
    )  # fmt: skip
    with group.agreed():
        session.check_names(classes)
    if planned is not None:
        with group.agreed():
            if group.leader:
                planned.check(session)
            among = planned.among(session) if group.leader else 0
    session.warn_early()
    session.prove(recipe, jobs)
    probe = session.probe()
    started = time.perf_counter()
    if session.made is not None and session.made[0] == replace(recipe, tune=None).to_json():
        _, model, layers = session.made
    else:
        model = sharing(session.start(recipe), session.dense)
        layers = recipe.method.convert(model, recipe.cut, replace(session.context(jobs), report=report))
    seconds = time.perf_counter() - started
    info: dict[str, Any] = {
        "layers": [layer.to_json() for layer in layers],
        "data_read": session.data_facts(),
    }
    if among > 1:
        info["chosen_among"] = among
    told = {"data": session.source, "division": info["data_read"]["division"]}
    info["stages"] = {"extracted": {**told, "seconds": seconds, "device": title_of(group.device)}}
    moee = MoeeModel(model.eval(), spec, replace(recipe, tune=None), session.source, probe, info, session.classes(probe))
    with kept(moee, "extracted", out, force, group, inputs=inputs):
        figures = measured(session, model, probe, "extracted on held-out images")
        info["stages"]["extracted"] = {**figures, **info["stages"]["extracted"]}
        info["data_read"] = session.data_facts()
        narrowed = attention_figures(model, session.dense, session.transform.shape)
        if narrowed:
            info["attention"] = [asdict(layer) for layer in narrowed]
    save(moee, out, force, group, inputs)
    if given is not None:  # whose dense model lives on, and shares weights with this one
        moee.model = copy.deepcopy(model)
    return moee
