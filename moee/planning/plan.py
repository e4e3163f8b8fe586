"""Which way of cutting a model wins: methods, allocations and budgets tried on the user's own model and data.

Each method is prepared once (calibration, grouping, sensitivity); each budget then costs a refit and an evaluation on the
held-out images. Every figure of a plan was measured on the model that `moee extract --plan` makes again.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from moee.errors import UserError
from moee.measure.accuracy import Comparison
from moee.methods.experts import USUAL as USUAL_ALLOCATIONS
from moee.methods.recipe import Recipe, read_recipe_json
from moee.mlps.find import find_ffns
from moee.models.model import ModelSpec
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder, resume_folder
from moee.places.placement import check_all
from moee.places.resume import ANSWERS, alone_on, check_identity, compare_identity, fingerprints
from moee.planning.budget import Budget
from moee.planning.forms import Latency
from moee.planning.found import PLAN, SCHEMA, Found
from moee.planning.race import Over, race
from moee.planning.search import ALLOCATIONS, STATIC, TARGETS, Planner, Way, recipe_of, usual, variants, ways
from moee.planning.shortlist import Candidate, Shortlist, Timed
from moee.progress import Reporter, silent
from moee.schema import Body, checked, shown
from moee.stages.identity import model_identity
from moee.stages.planned import Planned
from moee.stages.session import Session
from moee.stages.space import GRAPHS
from moee.store.artifact import read_json, read_manifest
from moee.store.result_kinds import PLAN as PLAN_FOLDER
from moee.store.result_kinds import PLAN_STATE

log = logging.getLogger("moee")
STORE_SCHEMA = "moee.plan-store/5"
IDENTITY, INTERRUPTED, CURE = "identity.json", "an interrupted plan", "finish that plan or remove the folder"


class Plan(Body):
    """What `extract --plan` reads of `plan.json`."""

    model: ModelSpec
    winner: dict[str, Any]


def make_plan(
    session: Session, budget: Budget, out: Path | str, *, methods: tuple[str, ...] | None = None,
    targets: tuple[float, ...] = TARGETS, base: dict[str, Any] | None = None, latency: Latency | Shortlist | None = None,
    force: bool = False, report: Reporter = silent, allocations: tuple[str, ...] = USUAL_ALLOCATIONS,
    attention: tuple[float, ...] = (1.0,), tokens: tuple[float, ...] = (1.0,), over: Over | None = None,
    slack: Budget | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`moee plan`: measure the methods at the targets, choose under `budget`, write `out/plan.json` and return it.

    `attention` are the shares of the attention's MACs that every method is tried with (1: as it is), `tokens` those of all MACs
    which merging tokens leaves before it (1: none merge). `base` are further options of every configuration, but for these.
    `latency` times every point as it is made, or, as a `Shortlist`, a few of them at the end, and only these and dense are then
    chosen from. Points of an interrupted run are kept in `<out>.resume`. With `over`, which says when the time for trials is over
    (`race`), targets are looked for by bisection (`moee.planning.race`), latencies are measured of points of enough quality
    alone, and the session keeps the winner's model, so that `run_extract` need not make it again. `slack`: a wider budget, which
    points are looked for under, since tuning may bring them within `budget`; the best of those is the plan's `ambitious` point.
    Raises `BudgetUnmet` if nothing meets the budget: it names the nearest point.
    """
    output, store = places(session, out, force)
    with alone_on(store.place, session.group.leader):
        found = search(
            session, budget, store, latency=latency, methods=methods, targets=targets, base=base, report=report,
            allocations=allocations, attention=attention, tokens=tokens, over=over, slack=slack,
        )  # fmt: skip
        chosen = found.candidates(latency.most) if isinstance(latency, Shortlist) else []
        timed = _timed(latency, chosen, store) if isinstance(latency, Shortlist) and chosen else None
        if isinstance(latency, Shortlist) and timed is None:  # what it was ranked by is no time of the device
            found = replace(found, points=[replace(point, latency=None) for point in found.points])
            found.planner.latency = None
        return found.conclude(output, store, chosen=chosen, timed=timed, report=report)


def _timed(shortlist: Shortlist, chosen: list[Candidate], store: OutputFolder) -> Timed:
    assert shortlist.time is not None, "candidates that are timed elsewhere go through emit_plan"
    try:
        return shortlist.time(chosen)
    except Exception as error:
        error.add_note(f"the points are kept in {store.place}, and the same command goes on from them")
        raise


def places(session: Session, out: Path | str, force: bool) -> tuple[OutputFolder, OutputFolder]:
    """Where a plan goes, and where its points are kept until then, both checked."""
    inputs = source_paths(session.source, session.spec.weights)
    output, store = OutputFolder(out, PLAN_FOLDER, force, inputs), resume_folder(out, PLAN_STATE, inputs)
    check_all([output, store])
    return output, store


def search(
    session: Session, budget: Budget, store: OutputFolder, *, latency: Latency | Shortlist | None = None,
    methods: tuple[str, ...] | None = None, targets: tuple[float, ...] = TARGETS, base: dict[str, Any] | None = None,
    report: Reporter = silent, allocations: tuple[str, ...] = USUAL_ALLOCATIONS, attention: tuple[float, ...] = (1.0,),
    tokens: tuple[float, ...] = (1.0,), over: Over | None = None, slack: Budget | None = None,
) -> Found:  # fmt: skip
    """The points of `make_plan`, kept in `store`, on which nobody else works. Raises `UserError` as `make_plan` does."""
    base, methods = base or {}, usual() if methods is None else methods
    check_ways(methods, allocations, attention, base, tokens)
    if budget.max_drop is not None:
        refuse_incomparable(session.early_comparison(), budget.max_drop)  # what is known before anything has run
    session.warn_early()
    if budget.target_latency_ms is not None and latency is None:
        raise UserError("--target-latency-ms needs a device to time or model; give --device")
    methods = applicable(session, methods)
    session.space.beside = GRAPHS
    told = {"model": model_identity(session), "base": base}
    compare_identity(store.place / IDENTITY, STORE_SCHEMA, told, INTERRUPTED, CURE)  # before trials and the reading of images
    for way in ways(methods, allocations, attention, tokens):  # said before a resumed plan is bound to the options
        session.prove(recipe_of(way, base))
    fresh = not store.place.exists()
    planner = planner_of(session, slack or budget, base, store, latency, report=report)
    planner.frugal = over is not None
    compared = session.comparison(planner.probe)
    if budget.max_drop is not None:
        try:
            refuse_incomparable(compared, budget.max_drop)
        except UserError:
            if fresh:
                store.remove()
            raise
    if budget.target_macs is not None and not budget.limits_quality:
        targets = (budget.target_macs,)
    left_out, untried = 0, list[Way]()
    if over is not None:
        points, left_out, untried = race(planner, ways(methods, allocations, attention, tokens), over)
    else:
        wanted = [(way, target) for way in ways(methods, allocations, attention, tokens) for target in targets]
        points = [p for way, target in wanted if (p := planner.point(way, target)) is not None]
        points += planner.refine(points, targets)
    points = list({json.dumps(p.recipe, sort_keys=True): p for p in points}.values())
    return Found(planner, points, compared, left_out, budget, untried)


def planner_of(
    session: Session, budget: Budget, base: dict[str, Any], store: OutputFolder, latency: Latency | Shortlist | None = None, *,
    report: Reporter,
) -> Planner:  # fmt: skip
    """The planner of the points in `store`. Raises `UserError` if these are of another model, other images or options."""
    train, val = fingerprints(session.train, session.held_out, report)
    told = {"model": model_identity(session), "base": base, "images": train, "held_out_images": val}
    check_identity(store.place / IDENTITY, STORE_SCHEMA, told, INTERRUPTED, CURE, said={"data": session.source})
    timing = latency.ranking if isinstance(latency, Shortlist) else latency
    return Planner(session, budget, base, store.place, timing, report=report, images={"train": train, "val": val})


def check_ways(
    methods: tuple[str, ...], allocations: tuple[str, ...], attention: tuple[float, ...], base: dict[str, Any],
    tokens: tuple[float, ...] = (1.0,),
) -> None:  # fmt: skip
    """Raise `UserError` for what can be said of a plan's options without its model: names that are unknown, values that do not
    fit."""
    for kind, given, known in (("method", methods, tuple(variants())), ("allocation", allocations, ALLOCATIONS)):
        unknown = sorted(set(given) - set(known))
        if unknown or not given:
            came = ", ".join(shown(name, quoted=False) for name in unknown) or "(none)"
            raise UserError(f"--{kind}s: unknown {kind} {came}; expected some of {', '.join(known)}")
    if base.keys() & {"attention_macs", "token_macs", "merge_tokens"}:
        raise ValueError("shares of the attention and of merged tokens go into `attention` and `tokens`, not into `base`")
    tried = {way.method for way in ways(methods, allocations, attention, tokens)}
    if untried := [method for method in methods if method not in tried]:
        raise UserError(f"--methods {', '.join(untried)}: it merges tokens itself, --token-macs merges some first; add 1 there")
    if "attention_heads" in base and all(share == 1 for share in attention):
        raise UserError("--attention-heads says how --attention-macs is met; give that too")
    for way in ways(methods, allocations, attention, tokens):
        recipe_of(way, base)


def applicable(session: Session, methods: tuple[str, ...]) -> tuple[str, ...]:
    """The methods that can cut the model. Where all of its MLPs are gated, those that take gated ones, if static pruning is among
    them. What cannot cut this model, such as merging tokens of a Swin, is left out where others are tried."""
    methods = _possible(session, methods)
    gated = all(ffn.gated for ffn in find_ffns(session.dense, shape=session.transform.shape, gated=True).ffns)
    fitting = tuple(name for name in methods if variants()[name][0].gated)
    if not gated or STATIC not in fitting or fitting == methods:
        return methods
    if session.group.leader:
        titles = {STATIC: "static pruning", "tokens": "merging tokens"}
        said = " and ".join(titles.get(name, name) for name in sorted(fitting, key=lambda name: name != STATIC))
        log.warning("all MLPs of %s are gated: of the methods, only %s is tried", session.spec.name, said)
    return fitting


def _possible(session: Session, methods: tuple[str, ...]) -> tuple[str, ...]:
    """Those that do not refuse the model by themselves; all where that would be none. What was asked for is left out with a
    warning."""
    refusals = {}
    for name in methods:
        method, variant = variants()[name]
        if method.cuts == "tokens" or not variant.usual:
            try:
                method.check(session.dense, session.transform.shape, recipe_of(Way(name, next(iter(method.allocations))), {}).cut)
            except UserError as error:
                refusals[name] = str(error).partition(";")[0]
    if len(refusals) == len(set(methods)):
        return methods
    for name, reason in refusals.items():
        if session.group.leader:
            log.log(logging.INFO if variants()[name][1].usual else logging.WARNING, "%s is not tried: %s", name, reason)
    return tuple(name for name in methods if name not in refusals)


def refuse_incomparable(compared: Comparison, max_drop: float) -> None:
    """Raise `UserError` where a limit of accuracy, in percentage points, cannot be checked, or could not fail."""
    if not compared:
        raise UserError(f"--max-drop cannot be checked: {compared.advised}; use --min-cosine")
    if idle := compared.idle(max_drop):
        raise UserError(f"--max-drop {max_drop:g} limits nothing: {idle}")


def planned_on(path: Path | str) -> Planned:
    """What a plan that `read_plan` took says of its images."""
    path = Path(path)
    body = read_json(path / PLAN if path.is_dir() else path)
    data, images, points = (body.get(name) for name in ("data", "images", "points"))
    known = isinstance(images, dict) and all(isinstance(value, str) for value in images.values())
    answers = body.get(ANSWERS)
    count = sum(point.get("method") != "dense" for point in points if isinstance(point, dict)) if isinstance(points, list) else 0
    return Planned(data if isinstance(data, str) else "", images if known else {}, count, answers)


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
