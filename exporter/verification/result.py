"""What `moee verify` checked, as a list of named cases with one verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from exporter.graph.export import TENSORRT
from exporter.graph.runtime_graph import RUNTIME
from exporter.parity import BatchError, ParityResult
from exporter.runners import PluginCheck
from exporter.verification.accuracy import AccuracyResult
from moee.measure.accuracy import drop_in_words
from moee.schema import json_safe


@dataclass(frozen=True)
class Case:
    """One check: `group` and `name` say what of, `failure` what went wrong (None: passed), `skipped` why it did not run,
    `error` what broke it off."""

    group: str
    name: str
    detail: str = ""
    failure: str | None = None
    skipped: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class EngineParity:
    """A built engine on this machine's GPU: output errors (none if the library is stale), and the plugin library beside it."""

    runtime: str
    plugin: PluginCheck
    built_from_this_export: bool | None
    batches: list[BatchError] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        compared = bool(self.batches) and all(b.passed for b in self.batches)
        return self.plugin.passed and self.built_from_this_export is not False and compared


@dataclass(frozen=True, repr=False)
class VerifyResult:
    """Parity, accuracy (None where labels or classes lack, `no_accuracy` says why) and engine (None if not asked for).
    `data`: the images that it was measured on, as they are recorded. `dense_failure`: what is wrong with the dense graph, without
    which there is nothing to compare."""

    export: str
    parity: ParityResult
    accuracy: AccuracyResult | None
    no_accuracy: str
    engine: EngineParity | None
    seconds: float
    data_read: dict[str, Any] = field(default_factory=dict)
    dense_failure: str = ""
    data: str = ""

    @property
    def passed(self) -> bool:
        accurate = self.accuracy is None or self.accuracy.passed
        return self.parity.passed and accurate and not self.dense_failure and (self.engine is None or self.engine.passed)

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        """The verdict, as a notebook shows it, and each check that failed or did not run, a line each."""
        cases = self.cases()
        failed = [f"{c.group} {c.name} failed: {c.failure or c.error}" for c in cases if c.failure or c.error]
        lines = [*failed, *(f"{c.group} {c.name} not checked: {c.skipped}" for c in cases if c.skipped)]
        return "\n".join([f"verify {self.export!r} {'passed' if self.passed else 'failed'}, {len(cases)} checks", *lines])

    def cases(self) -> list[Case]:
        """Every check in the order of the model."""
        cases = [Case("parity", name, failure=f"no {name} were compared") for name in self.parity.unchecked]
        cases += [_batch_case("parity", b) for b in self.parity.batches]
        damaged: dict[str, str] = {}
        for problem in self.parity.weight_problems:
            damaged.setdefault(problem.layer, problem.message)
        for layer in self.parity.layers:
            held = f"{TENSORRT} holds the model's weights" + (" and computes the layer" if layer.kind != "moee" else "")
            cases.append(Case("weights", layer.name, held, damaged.pop(layer.name, None)))
            off = layer.output_message
            cases.append(Case("layer", layer.name, off, None if layer.output_passed else f"the layer alone is off by {off}"))
            if layer.routes:
                cases.append(self._route_case(layer))
        for merge in self.parity.merges:
            cases.append(Case("merges", merge.name, f"{merge.matched:,} tokens", None if merge.passed else merge.message))
        cases += [Case("weights", name, "", message) for name, message in damaged.items()]
        cases += self._operator_cases()
        return cases + [self._accuracy_case()] + self._engine_cases()

    def _route_case(self, layer: Any) -> Case:
        floor = self.parity.min_route_agreement
        detail = f"{layer.agreement:.4%} equal, {layer.flips} flips"
        if layer.flips:
            detail += f", margin at most {layer.flip_margin_max:.3g} of the median gap"
            detail += ", near ties" if self.parity.only_ties else ""
        failure = None
        if layer.wrong_routes:
            failure = f"{layer.wrong_routes} of {layer.tokens} tokens take an expert that is not their best, and no near tie"
        elif layer.agreement < floor and not self.parity.only_ties:
            failure = f"only {layer.agreement:.4%} of the routes are equal, {floor:.4%} wanted"
        return Case("routes", layer.name, detail, failure)

    def _accuracy_case(self) -> Case:
        a = self.accuracy
        if self.dense_failure:
            return Case("accuracy", "dense outputs", failure=self.dense_failure)
        if a is None:
            return Case("accuracy", "drop", skipped=self.no_accuracy)
        drop, interval = drop_in_words(a.drop_pp, a.drop_interval_pp)
        detail = f"{drop} ({interval}) on {a.counted}"
        return Case("accuracy", "drop", detail, None if a.passed else f"{detail}; at most {a.max_drop_pp:g} allowed")

    def _operator_cases(self) -> list[Case]:
        operator = self.parity.operator
        if operator is None:
            return []
        if operator.skipped:
            return [Case("operator", RUNTIME, skipped=operator.skipped)]
        problems = [Case("operator", p.layer, failure=p.message) for p in operator.weight_problems]
        return [*(_batch_case("operator", b) for b in operator.batches), *problems]

    def _engine_cases(self) -> list[Case]:
        e = self.engine
        if e is None:
            return []
        layers = ", ".join(layer.name for layer in self.parity.layers if layer.kind == "moee")
        stale = None if e.plugin.passed else f"{e.plugin.message}; it runs {layers}"
        source = "was built from another export; run moee build again" if e.built_from_this_export is False else None
        unknown = "nothing says which export it was built from" if e.built_from_this_export is None else None
        return [
            Case("engine", "plugin", e.plugin.message, stale),
            Case("engine", "source", "", source, unknown),
            *([] if e.batches or stale else [Case("engine", "batches", failure="no batches were compared")]),
            *[_batch_case("engine", b) for b in e.batches],
        ]

    def to_json(self) -> dict[str, Any]:
        """parity.json: the parity result's keys, and beside them accuracy, engine and cases."""
        engine = {**asdict(self.engine), "passed": self.engine.passed} if self.engine else None
        return {
            **self.parity.to_json(),
            "accuracy": json_safe(self.accuracy.to_json()) if self.accuracy else None,
            "no_accuracy": self.no_accuracy,
            "dense_failure": self.dense_failure,
            "engine": json_safe(engine),
            "cases": [asdict(case) for case in self.cases()],
            "data": self.data,
            "data_read": self.data_read,
            "seconds": self.seconds,
            "passed": self.passed,
        }


def _batch_case(group: str, b: BatchError) -> Case:
    return Case(group, f"batch {b.batch}", b.message, None if b.passed else b.message)
