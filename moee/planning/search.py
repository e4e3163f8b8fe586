"""Points of a plan: each method is prepared once, each budget costs a refit and an evaluation."""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from moee.calibrate.calibration import LayerTokens
from moee.config import ExtractConfig, MethodOptions, make_extract_config, validated
from moee.errors import NothingRouted, OutOfReach, UserError
from moee.layers.report import LayerReport
from moee.measure.accuracy import Comparison
from moee.measure.metrics import original_macs, tokens_per_image
from moee.methods.base import Context
from moee.methods.clear_moe import ClearConfig
from moee.methods.convert import Prepared, apply, calibrate, ffn_budget, prepare, sensitivity_of
from moee.methods.registry import method_of, options_of
from moee.mlps.attention import macs_saved
from moee.mlps.find import find_ffns
from moee.planning.budget import Budget, Point, checked_point, choose, standing
from moee.progress import Reporter
from moee.stages.session import Session
from moee.store.artifact import read_json, write_json
from moee.store.atomic import temporary_folder

METHODS: dict[str, dict[str, Any]] = {
    "hdbscan": {"clustering": "hdbscan"},
    "kmeans-8": {"clustering": "kmeans", "clusters": 8, "components": 50},
    "kmeans-32": {"clustering": "kmeans", "clusters": 32, "components": 50},
    "kmeans-64": {"clustering": "kmeans", "clusters": 64, "components": 50},
    "static": {"clustering": "none"},
    "moefication": {"method": "moefication", "experts": 32, "selector": "router", "compensation": "mean"},
    "clear-moe": {"method": "clear-moe"},
}
USUAL = tuple(name for name in METHODS if name != "kmeans-64")  # whose router pays on varied data only
ALLOCATIONS: dict[str, dict[str, Any]] = {
    "share": {"criterion": "output_variance", "allocation": "expert"},
    "sensitivity": {"criterion": "sensitivity", "allocation": "model"},
}
TOP_K = "top-k"  # how MoEfication meets a budget: the same number of experts a token in every layer
RANKS = "ranks"  # how CLEAR-MoE does: a rank for every map
OWN = {"moefication": TOP_K, "clear-moe": RANKS}
TARGETS = (0.8, 0.7, 0.6, 0.5)
REFINEMENTS = 2  # bisections of the MACs between the last point that meets the budget and the first that does not


def allocations_of(method: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The ways in which a method can spend a budget, of those `wanted`."""
    return (OWN[method],) if method in OWN else wanted


class Way(NamedTuple):
    """How a point is made, but for its budget: key of `METHODS`, how it spends the budget, share of the attention's MACs."""

    method: str
    allocation: str
    attention: float = 1.0


def ways(methods: Iterable[str], allocations: tuple[str, ...], attention: Iterable[float]) -> list[Way]:
    """Every way of these, by share of the attention: what is calibrated for one share is of no use to another."""
    return [Way(m, a, share) for share in attention for m in methods for a in allocations_of(m, allocations)]


@dataclass(frozen=True)
class Latency:
    """Where and how models are timed: `label` tells one way from another, `of(model)` gives {"kind", "dense_ms", "moee_ms"}."""

    label: str
    of: Callable[[nn.Module], dict[str, Any]]


class Planner:
    """Makes and measures points. `base` are options that all of them share, but for the attention's share of MACs."""

    def __init__(
        self, session: Session, budget: Budget, base: dict[str, Any], store: Path, latency: Latency | None, report: Reporter
    ):
        self.session, self.budget, self.base, self.store = session, budget, base, store
        self.latency, self.report = latency, report
        self.probe = session.probe()
        self.prepared: dict[str, Prepared] = {}
        self.sampled: list[LayerTokens] = []
        self.scratch = ExitStack()
        weakref.finalize(self, self.scratch.close)
        self.attention = 1.0  # that `prepared` and `sampled` are of
        self.obstacle = ""  # why the last point that could not be made was not
        self.best: tuple[Point, nn.Module, Sequence[LayerReport]] | None = None  # of the points made by this process

    def config(self, way: Way, target: float) -> MethodOptions:
        """Raises `OutOfReach` if the target leaves a method nothing to choose from."""
        attention = {"attention_macs": way.attention, "attention_heads": self.base.get("attention_heads", "separate")}
        common = {k: v for k, v in self.base.items() if k not in attention}
        if way.attention < 1:
            common |= attention
        if way.allocation == RANKS:
            return ClearConfig(target_macs=target, **{k: v for k, v in common.items() if k in ("seed", *attention)})
        common |= METHODS[way.method]
        if way.allocation == TOP_K:
            common.pop("refit_tokens", None)
            return make_extract_config(**common, top_k=self._top_k(make_extract_config(**common), target))
        return make_extract_config(**common, **ALLOCATIONS[way.allocation], target_macs=target)

    def _turn_to(self, config: ExtractConfig) -> None:
        """Drop what was calibrated for another share of the attention: tokens fill the disk, groups and statistics the memory."""
        share = config.narrows[0] if config.narrows else 1.0
        if share != self.attention:
            self.prepared, self.sampled = {}, []
            self.scratch.close()
            self.attention = share

    def prepare(self, method: str, config: ExtractConfig) -> Prepared:
        """What all budgets of a method share; of `config` counts what they have in common."""
        self._turn_to(config)
        if method not in self.prepared:
            config = config.model_copy(update={**ALLOCATIONS["share"], "target_macs": None})
            sampled = self.calibrate(config)
            self.prepared[method] = prepare(
                self.session.start(config), self.session.train, config, self.report, sampled=sampled, group=self.session.group
            )
        return self.prepared[method]

    def _with_sensitivity(self, method: str, config: ExtractConfig) -> Prepared:
        """What `prepare` gives and, once an allocation asks for it, the error that dropping each neuron makes."""
        prepared = self.prepare(method, config)
        if config.criterion == "sensitivity" and prepared.routed and not prepared.error:
            model, data = self.session.start(config), self.session.train
            prepared.error.update(sensitivity_of(model, prepared.routed, data, config, self.report, self.session.group.device))
        return prepared

    def calibrate(self, config: ExtractConfig) -> list[LayerTokens]:
        """Calibration tokens, which all methods beside one share of the attention have in common; on disk until another's are."""
        self._turn_to(config)
        if not self.sampled:
            model, folder = self.session.start(config), self.scratch.enter_context(temporary_folder())
            ffns = find_ffns(model, config.exclude, gated=True).ffns  # of all methods
            self.sampled = calibrate(model, ffns, self.session.train, folder, config, self.report, self.session.group)
        return self.sampled

    def make(self, method: str, config: Any) -> tuple[nn.Module, Sequence[LayerReport]]:
        """A model by one of the plan's configurations. Raises `NothingRouted` or `OutOfReach` if it cannot be made."""
        model, group = copy.deepcopy(self.session.start(config)), self.session.group
        how = method_of(config)
        if how.shares == "groups":
            prepared = self._with_sensitivity(method, config)
            return model, apply(model, prepared, self.session.train, config, self.report, group.device)
        sampled = self.calibrate(config) if how.shares == "tokens" else None
        return model, how.convert(model, config, Context(self.session.train, self.report, group, sampled=sampled))

    def _top_k(self, config: ExtractConfig, target: float) -> int:
        """The most experts a token whose MACs, router included, meet `target`."""
        ffns = {f.name: f for f in find_ffns(self.session.dense, config.exclude).ffns}
        tokens = tokens_per_image(self.session.dense, ffns, self.session.transform.shape)
        assert config.experts is not None, "ExtractConfig validates that MoEfication has a number of experts"
        whole = sum(tokens[n] * f.macs for n, f in ffns.items())
        routers = sum(tokens[n] * f.dim * config.experts for n, f in ffns.items())
        start, shape = self.session.start(config), self.session.transform.shape
        budget = ffn_budget(original_macs(start, shape), whole, target, macs_saved(start, shape))
        most = int((budget - routers) * config.experts / whole)
        if most < 1:
            raise OutOfReach(f"--target-macs {target:g}: not one of {config.experts} experts a token fits")
        return min(most, config.experts)

    def point(self, way: Way, target: float) -> Point | None:
        """Make and measure one model, or read its figures if an interrupted run has; None if it cannot be made."""
        try:
            config = self.config(way, target)
        except OutOfReach as error:
            self.obstacle = str(error)
            return None
        identity = json.dumps([config.model_dump(mode="json"), self.latency and self.latency.label])
        key = hashlib.sha256(identity.encode()).hexdigest()[:16]
        file = self.store / f"{key}.json"
        if file.is_file():
            stored = read_json(file)
            return None if stored is None else self._known(checked_point(stored, file), way, config, file)
        try:
            model, reports = self.make(way.method, config)
        except (NothingRouted, OutOfReach) as error:
            self.obstacle = str(error)
            write_json(file, None)
            return None
        name = f"{way.method}, {way.allocation}, {target:.2f}" + (f", attention {way.attention:g}" if way.attention < 1 else "")
        measured = self.session.measure(model, self.probe, f"{name} on held-out images")
        kept, cost = measured["retention"], measured["cost"]
        drop = None if kept["accuracy"] is None else kept["dense_accuracy"] - kept["accuracy"]
        result = Point(
            way.method, way.allocation, cost["moee"]["macs"] / cost["dense"]["macs"],
            cost["moee"]["params"] / cost["dense"]["params"], kept["class_cosine"], kept["token_cosine"], kept["accuracy"], drop,
            self.latency.of(model) if self.latency else None, config.model_dump(mode="json"), kept["accuracy_interval"],
        )  # fmt: skip
        write_json(file, asdict(result))
        if choose([result] if self.best is None else [self.best[0], result], self.budget) is result:
            self.best = (result, model, reports)
        return result

    @staticmethod
    def _known(point: Point, way: Way, config: MethodOptions, file: Path) -> Point:
        """Raises `UserError` if a stored point is not the one that its file's name says."""
        if (point.method, point.allocation, point.config) != (way.method, way.allocation, config.model_dump(mode="json")):
            raise UserError(f"{file} holds a point of other options; remove {file.parent} and plan again")
        return point

    def made(self, point: Point) -> tuple[nn.Module, Sequence[LayerReport]]:
        """The model of a point that is not dense: the one at hand if it is the best made so far, else made again."""
        assert point.config is not None
        if self.best is not None and self.best[0].config == point.config:
            return self.best[1:]
        return self.make(point.method, validated(options_of(point.config), point.config))

    def dense(self, points: list[Point], compared: Comparison) -> Point:
        """The dense model as a point; its latency is the median of what was timed (or modelled) beside the others."""
        known = [p.latency for p in points if p.latency]
        latency = None
        if known:
            middle = statistics.median(k["dense_ms"] for k in known)
            latency = {**known[0], "dense_ms": middle, "moee_ms": middle, "speedup": 1.0}
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
            made.setdefault(Way(p.method, p.allocation, p.attention), []).append(p)
        ranked = sorted(sorted(made), key=lambda way: standing(made[way], self.budget))
        static = [way for way in ranked if way.method == "static"][:1]
        leaders = dict.fromkeys([*ranked[:2], *static])
        return sorted(leaders, key=lambda way: way.attention != self.attention)  # begin with the share at hand
