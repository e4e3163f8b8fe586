"""Which way of cutting a model wins: methods, allocations and budgets tried on the user's own model and data.

Each method is prepared once (calibration, grouping, sensitivity); each budget then costs a refit and an evaluation on the
held-out images. Every figure of a plan was measured on the model that `moee extract --plan` makes again.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moee.errors import UserError
from moee.measure.accuracy import Comparison
from moee.methods.recipe import Recipe, read_recipe_json
from moee.mlps.find import find_ffns
from moee.models.model import ModelSpec
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder, resume_folder
from moee.places.placement import check_all
from moee.places.resume import alone_on, check_identity, compare_identity, fingerprint
from moee.planning.budget import Budget, choose, margins, nearest, pareto
from moee.planning.layers import layer_table
from moee.planning.search import ALLOCATIONS, STATIC, TARGETS, Latency, Planner, recipe_of, usual, variants, ways
from moee.progress import Reporter, silent
from moee.schema import Body, checked, shown
from moee.stages.session import Session
from moee.store.artifact import read_json, read_manifest, write_manifest
from moee.store.result_kinds import PLAN as PLAN_FOLDER
from moee.store.result_kinds import PLAN_STATE

log = logging.getLogger("moee")
SCHEMA, STORE_SCHEMA = "moee.plan/2", "moee.plan-store/4"
PLAN, RECIPE = "plan.json", "recipe.toml"


class Plan(Body):
    """What `extract --plan` reads of `plan.json`."""

    model: ModelSpec
    winner: dict[str, Any]


def make_plan(
    session: Session, budget: Budget, out: Path | str, *, methods: tuple[str, ...] | None = None,
    targets: tuple[float, ...] = TARGETS, base: dict[str, Any] | None = None, latency: Latency | None = None,
    force: bool = False, report: Reporter = silent, allocations: tuple[str, ...] = ALLOCATIONS,
    attention: tuple[float, ...] = (1.0,),
) -> dict[str, Any]:  # fmt: skip
    """`moee plan`: measure the methods at the targets, choose under `budget`, write `out/plan.json` and return it.

    `attention` are the shares of the attention's MACs that every method is tried with (1: as it is). `base` are further options
    of every configuration, but for `attention_macs`. Points of an interrupted run are kept in `<out>.resume`. Raises
    `UserError` if nothing meets the budget: it names the nearest point.
    """
    inputs = source_paths(session.source, session.spec.weights)
    output, store = OutputFolder(out, PLAN_FOLDER, force, inputs), resume_folder(out, PLAN_STATE, inputs)
    check_all([output, store])
    methods = usual() if methods is None else methods
    with alone_on(store.place, session.group.leader):
        return _planned(session, budget, output, store, methods, targets, base, latency, report, allocations, attention)


def _planned(
    session: Session, budget: Budget, output: OutputFolder, store: OutputFolder, methods: tuple[str, ...],
    targets: tuple[float, ...], base: dict[str, Any] | None, latency: Latency | None, report: Reporter,
    allocations: tuple[str, ...], attention: tuple[float, ...],
) -> dict[str, Any]:  # fmt: skip
    """`make_plan`, of whose places nobody else works on."""
    check_ways(methods, allocations, attention, base or {})
    if budget.max_drop is not None:
        _refuse_incomparable(session.early_comparison())  # what is known before anything has run
    session.warn_early()
    if budget.target_latency_ms is not None and latency is None:
        raise UserError("--target-latency-ms needs a device to time or model; give --device")
    methods = _applicable(session, methods)
    model = {"name": session.spec.name, **session.spec.identity()}  # not where its weights lie
    told = {"model": model, "base": base or {}}
    stored, what, cure = store.place / "identity.json", "an interrupted plan", "finish that one or remove the folder"
    compare_identity(stored, STORE_SCHEMA, told, what, cure)  # before trials, and before all images are read
    for way in ways(methods, allocations, attention):  # said before a resumed plan is bound to the options
        recipe = recipe_of(way, base or {})
        session.prove(recipe)
    fresh = not store.place.exists()
    identity = {"model": session.spec.model_dump(mode="json"), "data": session.source, "base": base or {}}
    images = {"images": fingerprint(session.train, report), "held_out_images": fingerprint(session.held_out, report)}
    check_identity(stored, STORE_SCHEMA, {**told, **images}, what, cure, said={"data": session.source})
    planner = Planner(session, budget, base or {}, store.place, latency, report=report)
    compared = session.comparison(planner.probe)
    if budget.max_drop is not None and not compared:
        if fresh:
            store.remove()
        _refuse_incomparable(compared)
    if budget.target_macs is not None and not budget.limits_quality:
        targets = (budget.target_macs,)
    wanted = [(way, target) for way in ways(methods, allocations, attention) for target in targets]
    points = [p for way, target in wanted if (p := planner.point(way, target)) is not None]
    points += planner.refine(points, targets)
    points = list({json.dumps(p.recipe, sort_keys=True): p for p in points}.values())
    dense = planner.dense(points, compared)
    everything = [*points, dense]
    winner = choose(everything, budget)
    if winner is None:
        obstacle = f"; {planner.obstacle}" if not points and planner.obstacle else ""
        raise UserError(nearest(everything, budget) + obstacle)
    result = {
        **identity, "budget": budget.model_dump(),
        "winner": asdict(winner), "margins": margins(winner, points, dense, budget),
        "points": [asdict(p) for p in everything], "front": [asdict(p) for p in pareto(everything)],
        "layers": layer_table(session, planner, winner, report), "data_read": session.data_facts(),
        "accuracy": {"images": compared.images, "labelled": compared.labelled, "no_accuracy": compared.reason,
                     "probe": planner.probe is not None},
    }  # fmt: skip
    with output.write() as folder:
        if winner.recipe is not None:
            recipe = read_recipe_json(winner.recipe, PLAN)
            (folder / RECIPE).write_text(recipe.to_toml(), encoding="utf-8")
        write_manifest(folder, PLAN, SCHEMA, result)
    store.remove()
    return result


def check_ways(
    methods: tuple[str, ...], allocations: tuple[str, ...], attention: tuple[float, ...], base: dict[str, Any]
) -> None:
    """Raise `UserError` for what can be said of a plan's options without its model: names that are unknown, values that do not
    fit."""
    for kind, given, known in (("method", methods, tuple(variants())), ("allocation", allocations, ALLOCATIONS)):
        unknown = sorted(set(given) - set(known))
        if unknown or not given:
            came = ", ".join(shown(name, quoted=False) for name in unknown) or "(none)"
            raise UserError(f"--{kind}s: unknown {kind} {came}; expected some of {', '.join(known)}")
    if "attention_macs" in base:
        raise ValueError("shares of the attention go into `attention`, not into `base`")
    if "attention_heads" in base and all(share == 1 for share in attention):
        raise UserError("--attention-heads says how --attention-macs is met; give that too")
    for way in ways(variants(), ALLOCATIONS, attention):
        recipe_of(way, base)


def _applicable(session: Session, methods: tuple[str, ...]) -> tuple[str, ...]:
    """The methods that can cut the model: where all of its MLPs are gated, static pruning alone, if it is among them."""
    gated = all(ffn.only_static for ffn in find_ffns(session.dense, shape=session.transform.shape, gated=True).ffns)
    if not gated or STATIC not in methods or set(methods) == {STATIC}:
        return methods
    if session.group.leader:
        log.warning("all MLPs of %s are gated: of the methods, only static pruning is tried", session.spec.name)
    return (STATIC,)


def _refuse_incomparable(compared: Comparison) -> None:
    if not compared:
        raise UserError(f"--max-drop cannot be checked: {compared.advised}; use --min-cosine")


def planned_on(path: Path | str) -> str:
    """The data that a plan was made on; empty where it does not say."""
    path = Path(path)
    data = read_json(path / PLAN if path.is_dir() else path).get("data")
    return data if isinstance(data, str) else ""


def read_plan(path: Path | str, spec: ModelSpec) -> Recipe:
    """The winner's recipe from `plan.json` (or its folder). Raises `UserError` for a plan of another model, or for one
    whose winner is the dense model."""
    path = Path(path)
    plan = read_manifest(path, PLAN, SCHEMA) if path.is_dir() else read_manifest(path.parent, path.name, SCHEMA)
    made_for = checked(Plan, plan, path).model
    ours_all, theirs_all = ({"timm_name": s.timm_name, "pretrained": s.pretrained, **s.identity()} for s in (spec, made_for))
    for key in {**ours_all, **theirs_all}:
        ours, theirs = ours_all.get(key), theirs_all.get(key)
        if ours != theirs:
            came = f"made for {shown(made_for.name, quoted=False)} with {key} {shown(theirs)}"
            raise UserError(f"{path} was {came}, but this model has {shown(ours)}; plan again")
    recipe = plan["winner"].get("recipe")
    if not recipe:
        raise UserError(f"{path} says that the dense model wins; there is nothing to extract")
    return read_recipe_json(recipe, path)
