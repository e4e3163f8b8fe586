"""Points of a plan: each method is prepared once, each budget costs a refit and an evaluation."""

from __future__ import annotations

import hashlib
import json
import statistics
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from moee.calibrate.calibration import LayerTokens
from moee.config import Options
from moee.errors import NothingRouted, OutOfReach, UserError
from moee.layers.report import LayerReport
from moee.measure.accuracy import Comparison
from moee.methods.base import Method, Variant
from moee.methods.convert import Prepared, calibrate
from moee.methods.experts import ALLOCATIONS as EXPERT_ALLOCATIONS
from moee.methods.experts import WIDTHS
from moee.methods.recipe import Recipe, read_recipe_json, recipe_with
from moee.methods.registry import METHODS, cutting
from moee.mlps.find import find_ffns
from moee.models.model import sharing
from moee.planning.budget import Budget, Point, checked_point, choose, standing
from moee.planning.forms import Latency
from moee.progress import Reporter, reported
from moee.stages.session import Session
from moee.store.artifact import read_json, write_json
from moee.store.scratch import temporary_folder

PLAN_POINT = "a plan's point"  # what a message calls the recipe of one
ALLOCATIONS = tuple(EXPERT_ALLOCATIONS)
UNSAID = {"width_multiple": WIDTHS}  # values of options that the base of a plan does not name
STATIC = "static"  # the variant that cuts gated MLPs
ALONE = (1.0, 1.0)  # shares of a way that nothing is done beside
TARGETS = (0.8, 0.7, 0.6, 0.5)
REFINEMENTS = 2  # bisections of the MACs between the last point that meets the budget and the first that does not


def variants() -> dict[str, tuple[Method[Any], Variant]]:
    """Every way of a method that a plan can try, by name."""
    return {name: (method, variant) for method in METHODS for name, variant in method.variants.items()}


def usual() -> tuple[str, ...]:
    """Those that it tries when nobody says which."""
    return tuple(name for name, (_, variant) in variants().items() if variant.usual)


def allocations_of(variant: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The ways in which a variant of a method can spend a budget: of those `wanted`, or its method's own."""
    own = tuple(variants()[variant][0].allocations)
    return wanted if set(own) == set(ALLOCATIONS) else own


class Way(NamedTuple):
    """How a point is made, but for its budget: key of `variants`, how it spends the budget, share of the attention's MACs, share
    of the MACs that merging tokens leaves first."""

    method: str
    allocation: str
    attention: float = 1.0
    tokens: float = 1.0

    @property
    def first(self) -> tuple[float, float]:
        """What the steps before the last are told."""
        return self.attention, self.tokens

    @property
    def beside(self) -> str:
        """What is done beside the method, for a title."""
        narrowed = f", attention {self.attention:g}" if self.attention < 1 else ""
        return narrowed + (f", tokens {self.tokens:g}" if self.tokens < 1 else "")


def ways(
    methods: Iterable[str], allocations: tuple[str, ...], attention: Iterable[float], tokens: Iterable[float] = (1.0,)
) -> list[Way]:
    """Every way of these, by share of the attention and of merged tokens: what is calibrated for one is of no use to another. A
    method that does not go beside narrower heads or merged tokens is tried without, if that is wanted too; one that merges tokens
    itself is never tried beside merged ones."""
    merging = {name for name, (method, _) in variants().items() if method.cuts == "tokens"}
    every = [
        Way(m, a, share, left)
        for left in tokens for share in attention for m in methods if left == 1 or m not in merging
        for a in allocations_of(m, allocations)
    ]  # fmt: skip
    alone = {way.method for way in every if way.first == ALONE}
    return [way for way in every if way.first == ALONE or way.method not in alone or _goes(way)]


def _goes(way: Way) -> bool:
    """Whether the steps of a way go together; whether their values fit is not asked here."""
    method, _ = variants()[way.method]
    beside = [part for part, share in zip(("attention", "tokens"), way.first, strict=True) if share != 1]
    before = [other.name for part in beside for other in cutting(part)]
    return not method.obstacle(recipe_of(way._replace(attention=1.0, tokens=1.0), {}).cut, before)


def recipe_of(way: Way, base: dict[str, Any]) -> Recipe:
    """The recipe of a way, of the options `base` those that its steps know, without a budget. Raises `UserError` for values that
    do not fit."""
    method, variant = variants()[way.method]
    known, beside = set(method.options.model_fields), {}
    for part, name, share in (("attention", "attention_macs", way.attention), ("tokens", "token_macs", way.tokens)):
        if share != 1:
            beside[name] = share
            known |= {option for other in cutting(part) for option in other.options.model_fields}
    given = {name: value for name, value in {**UNSAID, **base}.items() if name in known}
    return recipe_with(method, {**given, **beside, **variant.values, **method.allocations[way.allocation]})


class Planner:
    """Makes and measures points. `base` are options that all of them share, but for the attention's share of MACs.
    `frugal`, which who makes it may set: latencies are measured of points of enough quality alone. `images`: fingerprints."""

    def __init__(
        self, session: Session, budget: Budget, base: dict[str, Any], store: Path, latency: Latency | None, *, report: Reporter,
        images: Mapping[str, str] | None = None,
    ):  # fmt: skip
        self.session, self.budget, self.base, self.store = session, budget, base, store
        self.latency, self.report, self.frugal, self.images = latency, report, False, dict(images or {})
        self.probe = session.probe()
        self.prepared: dict[str, Prepared] = {}
        self.sampled: list[LayerTokens] = []
        self.scratch = ExitStack()
        weakref.finalize(self, self.scratch.close)
        self.ready: Callable[[], None] = lambda: None  # called when what later points of a way need not do again is done
        self.first: tuple[Options, ...] = ()  # the steps that `prepared` and `sampled` come after
        self.failed: list[tuple[Way, float, str]] = []  # points that could not be made, and why
        self.best: tuple[Point, nn.Module, Sequence[LayerReport]] | None = None  # of the points made by this process

    def recipe(self, way: Way, target: float) -> Recipe:
        """Raises `OutOfReach` if the target leaves a method nothing to choose from."""
        recipe = recipe_of(way, {**self.base, **self._by_layer(way)})
        start, shape = self.session.start(recipe), self.session.transform.shape
        return replace(recipe, steps=(*recipe.first, recipe.method.within(recipe.cut, target, start, shape)))

    def _by_layer(self, way: Way) -> dict[str, Any]:
        """Options that leave MLPs as they are, or with one expert, where the device takes no less time for more, and that spend
        the budget by its time. Those are for methods that know them."""
        if self.latency is None or self.latency.forms is None:
            return {}
        method, variant = variants()[way.method]
        experts = int(variant.values.get("clusters", 1))
        values = self.latency.choices(experts, self.store).values(tuple(self.base.get("exclude", ())), experts)
        if method.allocations[way.allocation].get("allocation") != "model":  # no layer is held against another
            values.pop("mac_time", None)
        return values

    def _turn_to(self, recipe: Recipe) -> None:
        """Drop what was calibrated after other steps: tokens fill the disk, groups and statistics the memory."""
        if recipe.first != self.first:
            self.prepared, self.sampled = {}, []
            self.scratch.close()
            self.first = recipe.first

    def prepare(self, variant: str, recipe: Recipe) -> Prepared:
        """What all budgets of a variant share; of the options counts what they have in common."""
        self._turn_to(recipe)
        if variant not in self.prepared:
            common = recipe.cut.model_copy(update={**next(iter(recipe.method.allocations.values())), "target_macs": None})
            context = self.session.context(sampled=self.calibrate(recipe))
            self.prepared[variant] = recipe.method.prepare(self.session.start(recipe), common, context)
            self.ready()
        return self.prepared[variant]

    def calibrate(self, recipe: Recipe) -> list[LayerTokens]:
        """Calibration tokens, which all methods after the same steps have in common; on disk until another's are."""
        self._turn_to(recipe)
        if not self.sampled:
            model, folder = self.session.start(recipe), self.scratch.enter_context(temporary_folder())
            ffns = find_ffns(model, recipe.cut.exclude, gated=True).ffns  # of all methods
            self.sampled = calibrate(model, ffns, folder, recipe.cut, self.session.context())
            self.ready()
        return self.sampled

    def make(self, variant: str, recipe: Recipe) -> tuple[nn.Module, Sequence[LayerReport]]:
        """A model by one of the plan's recipes. Raises `NothingRouted` or `OutOfReach` if it cannot be made."""
        model, method = sharing(self.session.start(recipe), self.session.dense), recipe.method
        if method.shares == "groups":
            prepared = self.prepare(variant, recipe)
            return model, method.apply(model, prepared, recipe.cut, self.session.context())
        sampled = self.calibrate(recipe) if method.shares == "tokens" else None
        return model, method.convert(model, recipe.cut, self.session.context(sampled=sampled))

    def point(self, way: Way, target: float) -> Point | None:
        """Make and measure one model, or read its figures if an interrupted run has; None if it cannot be made."""
        try:
            recipe = self.recipe(way, target)
        except OutOfReach as error:
            return self._failed(way, target, str(error))
        identity = json.dumps([recipe.to_json(), self.latency and self.latency.label, *["frugal"] * self.frugal])
        file = self.store / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
        if file.is_file():
            stored = read_json(file)
            if stored is None or isinstance(stored, str):
                return self._failed(way, target, stored or "an earlier run could not make it")
            known = self._known(checked_point(stored, file), way, recipe, file)
            if known.latency or not self._to_be_timed(known):  # under another budget it was not
                return known
        try:
            model, reports = self.make(way.method, recipe)
        except (NothingRouted, OutOfReach) as error:
            write_json(file, str(error))
            return self._failed(way, target, str(error))
        name = ", ".join(filter(None, [way.method, way.allocation, f"{target:.2f}"])) + way.beside
        measured = self.session.measure(model, self.probe, f"{name} on held-out images")
        kept, cost = measured["retention"], measured["cost"]
        drop = None if kept["accuracy"] is None else kept["dense_accuracy"] - kept["accuracy"]
        result = Point(
            way.method, way.allocation, cost["moee"]["macs"] / cost["dense"]["macs"],
            cost["moee"]["params"] / cost["dense"]["params"], kept["class_cosine"], kept["token_cosine"], kept["accuracy"], drop,
            None, recipe.to_json(), kept["accuracy_interval"], way.attention, way.tokens,
        )  # fmt: skip
        if self.latency is not None and self._to_be_timed(result):
            with reported(f"{name}, export and timing", self.report):
                result = replace(result, latency=self.latency.timed(model))
        write_json(file, asdict(result))
        if choose([result] if self.best is None else [self.best[0], result], self.budget) is result:
            self.best = (result, model, reports)
        return result

    def _to_be_timed(self, point: Point) -> bool:
        return self.latency is not None and not (self.frugal and point.lacks_quality(self.budget))

    def _failed(self, way: Way, target: float, why: str) -> Point | None:
        self.failed.append((way, target, why))
        return None

    @staticmethod
    def _known(point: Point, way: Way, recipe: Recipe, file: Path) -> Point:
        """Raises `UserError` if a stored point is not the one that its file's name says."""
        if (point.method, point.allocation, point.recipe) != (way.method, way.allocation, recipe.to_json()):
            raise UserError(f"{file} holds a point of other options; remove {file.parent} and plan again")
        return point

    def made(self, point: Point) -> tuple[nn.Module, Sequence[LayerReport]]:
        """The model of a point that is not dense: the one at hand if it is the best made so far, else made again."""
        assert point.recipe is not None
        if self.best is not None and self.best[0].recipe == point.recipe:
            return self.best[1:]
        return self.make(point.method, read_recipe_json(point.recipe, PLAN_POINT))

    def dense(self, points: list[Point], compared: Comparison) -> Point:
        """The dense model as a point; its latency is the median of what was timed (or modelled) beside the others."""
        known = [p.latency for p in points if p.latency]
        if not known and self.latency is not None and self.budget.target_latency_ms is not None:  # it may meet the budget alone
            known = [self.latency.timed(self.session.dense)]
        latency = None
        if known:
            middle = statistics.median(k["dense_ms"] for k in known)
            others = {k: v for k, v in known[0].items() if k not in ("predicted_ms", "speedup_range")}  # those of another model
            latency = {**others, "dense_ms": middle, "moee_ms": middle, "speedup": 1.0}
        right = compared.dense if compared else None
        accuracy, drop, interval = (None, None, None) if right is None else (right.value, 0.0, list(right.interval))
        return Point("dense", "", 1.0, 1.0, 1.0, 1.0, accuracy, drop, latency, None, interval)

    def refine(self, points: list[Point], targets: tuple[float, ...]) -> list[Point]:
        """More points between the one that meets the budget most tightly and its cheaper (or dearer) neighbour."""
        added: list[Point] = []
        for way in self._leaders(points):
            tried = sorted((t, p) for t in targets if (p := self.point(way, t)) is not None)
            ok = [t for t, p in tried if not p.shortfalls(self.budget)]
            bad = [t for t, p in tried if p.shortfalls(self.budget)]
            good: float | None = None
            worse: float | None = None
            if self.budget.limits_quality:  # the cheapest that is good enough, dense at worst
                good = min(ok, default=1.0)
                worse = max((t for t in bad if t < good), default=None)
            elif ok:  # the dearest that is cheap enough
                good = max(ok)
                worse = min((t for t in bad if t > good), default=None)
            for _ in range(REFINEMENTS):
                if good is None or worse is None:
                    break
                middle = round((good + worse) / 2, 4)
                point = self.point(way, middle)
                if point is None:
                    break
                added.append(point)
                good, worse = (good, middle) if point.shortfalls(self.budget) else (middle, worse)
        return added

    def _leaders(self, points: list[Point]) -> list[Way]:
        """The two ways that serve the budget best, and the best static one: those worth more evaluations."""
        made: dict[Way, list[Point]] = {}
        for p in points:
            made.setdefault(Way(p.method, p.allocation, p.attention, p.tokens), []).append(p)
        ranked = sorted(sorted(made), key=lambda way: standing(made[way], self.budget))
        static = [way for way in ranked if way.method == STATIC][:1]
        leaders = dict.fromkeys([*ranked[:2], *static])
        return sorted(leaders, key=lambda way: recipe_of(way, self.base).first != self.first)  # begin with the model at hand
