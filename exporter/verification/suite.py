"""Everything that `moee verify` checks, as a list of named cases with one verdict."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.belonging import built_from
from exporter.graph.export import DENSE, PORTABLE, REFERENCE, TENSORRT, read_quantization
from exporter.manifests import read_engine, read_export
from exporter.onnx_safety import load_ir
from exporter.parity import DEFAULT_BATCHES, BatchError, ParityResult, check_parity
from exporter.parity.check import image_pool, logits, output_errors, refuse_foreign, refuse_unrouted
from exporter.parity.taps import copied
from exporter.parity.yardsticks import yardsticks
from exporter.precision import INT8
from exporter.quantization import Quantization
from exporter.runners import EngineRunner, OnnxRunner, PluginCheck, Runner, check_plugin
from exporter.verification.accuracy import AccuracyResult, compare_accuracy
from moee.artifacts.model import MoeeModel
from moee.data.image_set import ImageSet, batches, merge_skipped
from moee.errors import UserError
from moee.measure.accuracy import NO_ANSWER, Comparison, comparison, top1
from moee.measure.probe import classes_told, head_drawn
from moee.parallel.group import SOLO, Group, Parcel
from moee.progress import Reporter, silent
from moee.schema import json_safe

log = logging.getLogger("moee")
ACCURACY_BATCH = 16


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


@dataclass(frozen=True)
class VerifyResult:
    """Parity, accuracy (None where labels or classes lack, `no_accuracy` says why) and engine (None if not asked for).
    `dense_failure`: what is wrong with the dense graph, without which there is nothing to compare."""

    export: str
    parity: ParityResult
    accuracy: AccuracyResult | None
    no_accuracy: str
    engine: EngineParity | None
    seconds: float
    data_read: dict[str, Any] = field(default_factory=dict)
    dense_failure: str = ""

    @property
    def passed(self) -> bool:
        accurate = self.accuracy is None or self.accuracy.passed
        return self.parity.passed and accurate and not self.dense_failure and (self.engine is None or self.engine.passed)

    def __bool__(self) -> bool:
        return self.passed

    def cases(self) -> list[Case]:
        """Every check in the order of the model."""
        found = [Case("parity", name, failure=f"no {name} were compared") for name in self.parity.unchecked]
        found += [_batch_case("parity", b) for b in self.parity.batches]
        damaged: dict[str, str] = {}
        for problem in self.parity.weight_problems:
            damaged.setdefault(problem.layer, problem.message)
        for layer in self.parity.layers:
            held = f"{TENSORRT} holds the model's weights" + (" and computes the layer" if layer.kind != "moee" else "")
            found.append(Case("weights", layer.name, held, damaged.pop(layer.name, None)))
            off = layer.output_message
            found.append(Case("layer", layer.name, off, None if layer.output_passed else f"the layer alone is off by {off}"))
            if layer.routes:
                found.append(self._route_case(layer))
        found += [Case("weights", name, "", message) for name, message in damaged.items()]
        return found + [self._accuracy_case()] + self._engine_cases()

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
        low, high = a.drop_interval_pp
        detail = f"drop {a.drop_pp:.2f} points ({low:.2f} to {high:.2f}) on {a.counted}"
        return Case("accuracy", "drop", detail, None if a.passed else f"{detail}; at most {a.max_drop_pp:g} allowed")

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
            "data_read": self.data_read,
            "seconds": self.seconds,
            "passed": self.passed,
        }


def _batch_case(group: str, b: BatchError) -> Case:
    return Case(group, f"batch {b.batch}", b.message, None if b.passed else b.message)


def verify(
    export_dir: Path | str, moee: MoeeModel, data: ImageSet, *, sizes: Sequence[int] = DEFAULT_BATCHES, provider: str = "cpu",
    threads: int | None = None, rtol: float | None = None, atol: float | None = None, max_drop_pp: float | None = None,
    min_route_agreement: float | None = None, images: int | None = 1000, engine: Path | str | None = None,
    report: Reporter = silent, trust_engine: bool = False,
) -> VerifyResult:  # fmt: skip
    """Verify an export, and an engine folder if given. `images`: labelled images for accuracy (None: all; 0: none).
    `trust_engine`: as in `EngineRunner`.

    Raises `UserError` for folders that do not belong together, `MissingDependency` for an absent provider, plugin or GPU.
    """
    result = verify_ranks(
        SOLO, export_dir, moee, data, sizes=sizes, provider=provider, threads=threads, rtol=rtol, atol=atol,
        max_drop_pp=max_drop_pp, min_route_agreement=min_route_agreement, images=images, engine=engine, report=report,
        trust_engine=trust_engine,
    )  # fmt: skip
    assert result is not None, "one process alone is rank 0"
    return result


def verify_ranks(
    group: Group, export_dir: Path | str, moee: MoeeModel, data: ImageSet, *, sizes: Sequence[int] = DEFAULT_BATCHES,
    provider: str = "cpu", threads: int | None = None, rtol: float | None = None, atol: float | None = None,
    max_drop_pp: float | None = None, min_route_agreement: float | None = None, images: int | None = 1000,
    engine: Path | str | None = None, report: Reporter = silent, trust_engine: bool = False,
) -> VerifyResult | None:  # fmt: skip
    """`verify` on the ranks of a `group`: the images of the accuracy are divided, parity and engine are rank 0's. The result is
    rank 0's, None on the others."""
    started = time.perf_counter()
    folder = Path(export_dir)
    check = _AccuracyCheck(folder, moee, data, images, provider, threads, report, group)
    plugin = None
    with group.agreed():
        refuse_foreign(folder, moee)
        refuse_unrouted(moee, min_route_agreement)
        early = check.early()
        reason = early.reason
        _refuse_unchecked(early.advised, max_drop_pp)
        if early.cure and group.leader:
            log.warning("accuracy will not be compared: %s", early.advised)
        if group.leader:
            plugin = check_plugin(engine, trust_engine) if engine is not None else None  # before anything long
            if engine is not None and plugin is not None and plugin.passed:
                with EngineRunner(engine, trust=trust_engine):
                    pass  # a machine that cannot run it says so now
    dense, failure = None, ""
    if not reason:
        dense = check.outputs("dense")
        reason, failure = check.judge(dense)
    if not failure:
        with group.agreed():  # before minutes of parity
            _refuse_unchecked(reason, max_drop_pp)
    parity = None
    with group.agreed():
        if group.leader:
            parity = check_parity(
                folder, moee, data, threads, report, sizes=sizes, provider=provider, rtol=rtol, atol=atol,
                min_route_agreement=min_route_agreement, group=group,
            )  # fmt: skip
    accuracy = None if dense is None or reason else check.compare(dense, check.outputs("moee"), max_drop_pp)
    built, result = None, None
    with group.agreed():
        if parity is not None:
            if engine is not None and plugin is not None:
                built = _engine(folder, Path(engine), plugin, moee, data, parity.precision, rtol, atol, report, trust_engine)
            read = {"val": data.facts(), "notes": list(data.notes)}
            result = VerifyResult(folder.name, parity, accuracy, reason, built, time.perf_counter() - started, read, failure)
    return result


def _refuse_unchecked(reason: str, max_drop_pp: float | None) -> None:
    """A gate that has nothing to check is bad input, not a pass."""
    if reason and max_drop_pp is not None:
        raise UserError(f"--max-drop cannot be checked: {reason}; leave --max-drop out to go on without it")


@dataclass(frozen=True)
class _AccuracyCheck:
    """The accuracy of both graphs of an export on `images` images of `data` (None: all), divided over the ranks of `group`."""

    folder: Path
    moee: MoeeModel
    data: ImageSet
    images: int | None
    provider: str
    threads: int | None
    report: Reporter
    group: Group

    def early(self) -> Comparison:
        """What is known without running anything."""
        if self.images == 0:
            return Comparison(len(self.data), 0, "switched off with --images 0")
        told = classes_told(self.moee.model, self.moee.probe)
        drawn = head_drawn(self.moee.spec, self.moee.probe)
        return comparison(self.data.labels, self.data.num_classes, told, self.data.name, drawn=drawn)

    def chosen(self) -> Tensor:
        """Positions of the images that are looked at: labelled ones, drawn once."""
        labelled = torch.tensor([index for index, label in enumerate(self.data.labels) if label >= 0])
        return labelled[torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))][: self.images or None]

    def outputs(self, name: str) -> dict[str, Tensor]:
        """Logits [N, C] of `dense` or `moee` and labels [N] of the same images, in their order, on rank 0; nothing on the others.

        An int8 model is held against the dense one as it was, in float32: the loss of the quantisation is part of the drop."""
        answers: dict[str, Tensor] = {}
        with self.group.agreed():
            answers = self._own(name)
        if not self.group.alone:
            merge_skipped(self.data, self.group)
        parts = [part.tensors for part in self.group.gather(Parcel(None, answers)) if part.tensors]
        with self.group.agreed():
            if self.group.leader and not parts:
                first = self.data.describe(int(self.chosen()[0]))
                raise UserError(
                    f"none of the {len(self.chosen())} labelled images of {self.data.name} that are looked at could be read "
                    f"(first: {first}); check the files, or look at more with --images"
                )
        whole = {key: torch.cat([part[key] for part in parts]) for key in ("outputs", "labels")} if parts else {}
        return {"logits": logits(self.moee, whole["outputs"]), "labels": whole["labels"]} if whole else {}

    def _own(self, name: str) -> dict[str, Tensor]:
        """This rank's share; empty if it has no image to read."""
        precision = read_export(self.folder, verify=False).get("precision", "fp32")
        graph = PORTABLE if name == "moee" else REFERENCE if precision in INT8 else DENSE
        order = self.chosen()
        mine = self.group.part(len(order), ACCURACY_BATCH)
        order = order[mine.start : mine.stop]
        found: dict[str, list[Tensor]] = {"outputs": [], "labels": []}
        with opened(self.folder / graph, self.threads, self.provider, precision == "bf16" and self.provider == "cpu") as runner:
            total = -(-len(order) // ACCURACY_BATCH)
            message = f"accuracy, {name}"
            self.report(message, 0, total)
            for done, batch in enumerate(batches(self.data, ACCURACY_BATCH, order=order, strict=False), 1):
                found["outputs"].append(torch.from_numpy(runner.run(batch.images.numpy())[0]))
                found["labels"].append(batch.labels)
                self.report(message, done, total)
        return {key: torch.cat(part) for key, part in found.items() if part}

    def judge(self, dense: dict[str, Tensor]) -> list[str]:
        """Why the dense graph's answers allow no comparison, and what is wrong with that graph, the same on every rank; each is
        empty for nothing. Extraction takes no model whose outputs are not finite, so such a graph is not what the model is."""
        found = None
        with self.group.agreed():
            if self.group.leader:
                told = classes_told(self.moee.model, self.moee.probe)
                drawn = head_drawn(self.moee.spec, self.moee.probe)
                compared = comparison(dense["labels"], self.data.num_classes, told, self.data.name, dense["logits"], drawn)
                reason = compared.reason
                silent = int((top1(dense["logits"]) == NO_ANSWER).sum())
                failure = f"its outputs are NaN or infinite on {silent} of {len(dense['logits'])} images; export again"
                found = [reason, f"the graph of the dense model is broken: {failure}" if silent else ""]
        return self.group.broadcast(Parcel(found) if self.group.leader else None).body

    def compare(self, dense: dict[str, Tensor], ours: dict[str, Tensor], max_drop_pp: float | None) -> AccuracyResult | None:
        """Both graphs' answers compared; None on ranks other than 0."""
        with self.group.agreed():
            if not self.group.leader:
                return None
            if not torch.equal(dense["labels"], ours["labels"]):
                raise UserError(f"images of {self.data.name} that could be read before cannot be read any more; verify again")
            chosen = self.chosen()
            capped = len(chosen) < sum(label >= 0 for label in self.data.labels)
            unlabelled = 0 if capped else len(self.data) - len(chosen)
            probe = self.moee.probe is not None
            return compare_accuracy(dense["logits"], ours["logits"], dense["labels"], max_drop_pp, unlabelled, probe)


@contextmanager
def opened(graph: Path, threads: int | None, provider: str, widen: bool):
    """A runner of a graph as it lies there, or of a float32 copy of a bfloat16 one."""
    if not widen:
        with OnnxRunner(graph, threads, provider) as runner:
            yield runner
        return
    with copied(load_ir(graph), graph, True) as path, OnnxRunner(path, threads, provider) as runner:
        yield runner


def _engine(
    export_dir: Path, folder: Path, plugin: PluginCheck, moee: MoeeModel, data: ImageSet, precision: str, rtol: float | None,
    atol: float | None, report: Reporter, trust: bool = False,
) -> EngineParity:  # fmt: skip
    """Run the MoEE engine at its own profile's batch sizes."""
    manifest = read_engine(folder, trust)
    export = read_export(export_dir, verify=False)
    same = built_from(manifest, export, export_dir / export.get("graphs", {}).get("tensorrt", TENSORRT))
    if not plugin.passed:
        return EngineParity(manifest["builder"], plugin, same)
    sizes = sorted({manifest["batch"][k] for k in ("min", "opt", "max")})
    with EngineRunner(folder, trust=trust) as runner:
        errors = run_engine(runner, moee, data, precision, sizes, rtol, atol, report, read_quantization(export, "moee"))
        return EngineParity(runner.name, plugin, same, errors)


def run_engine(
    runner: Runner, moee: MoeeModel, data: ImageSet, precision: str, sizes: Sequence[int], rtol: float | None = None,
    atol: float | None = None, report: Reporter = silent, quantization: Quantization | None = None,
) -> list[BatchError]:  # fmt: skip
    """Output errors of an engine that is open already; `quantization` of an int8 one."""
    yard = yardsticks(moee.model, precision, quantization=quantization)
    return output_errors(runner, yard, image_pool(data, sizes[-1])[0], sizes, rtol, atol, report, "engine")


