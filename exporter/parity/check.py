"""Check an export folder's portable graph against its torch model: outputs by batch size, layers, routes and weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporter.belonging import export_ids
from exporter.forms.form import WeightProblem
from exporter.graph.export import PORTABLE, TENSORRT, read_quantization
from exporter.graph.runtime_graph import RUNTIME
from exporter.manifests import read_export
from exporter.onnx_safety import load_ir
from exporter.parity.int8 import check_int8
from exporter.parity.layers import LayerParity, layer_parity
from exporter.parity.merges.reader import MergeReader, check_merges, following, merge_reader
from exporter.parity.operator import OperatorParity, tapped_operator, why_not_run
from exporter.parity.outputs import BatchError, batch_error
from exporter.parity.probes import check_form, probe_layers, standard_layers
from exporter.parity.refusals import refuse_foreign, refuse_unrouted
from exporter.parity.result import ParityResult
from exporter.parity.taps import Tap, copied, hooked, tapped_graph, taps_of
from exporter.parity.ties import dictated, excuse_ties, only_ties, with_own_error
from exporter.parity.weights import check_weights
from exporter.parity.yardsticks import Yardsticks, yardsticks
from exporter.precision import dtype_of
from exporter.runners import Runner, graph_runner
from exporter.timing.profile import DEFAULT_BATCH
from moee.artifacts.model import MoeeModel
from moee.data.image_set import ImageSet, batches
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.measure.accuracy import shared_answers
from moee.measure.probe import classes_told
from moee.parallel.group import SOLO, Group
from moee.progress import Reporter, silent

DEFAULT_BATCHES = DEFAULT_BATCH
AGREEMENT_IMAGES = 64
LAYER_IMAGES = 8  # every layer's tokens are held in memory at once, in float64
# Routes that must equal the float64 run's. In half precision and int8 near ties flip, so only wrong routes fail there.
MIN_ROUTE_AGREEMENT = {"fp32": 0.9999}


def image_pool(data: ImageSet, count: int) -> tuple[Tensor, int]:
    """`count` images [count, C, H, W] of `data`, drawn once, and how many differ: they repeat where there are fewer."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
    pool = torch.cat([b.images for b in batches(data, 8, order=order)])
    return pool.repeat(-(-count // len(pool)), 1, 1, 1)[:count], min(count, len(pool))


@torch.inference_mode()
def output_errors(
    runner: Runner, yard: Yardsticks, pool: Tensor, sizes: Sequence[int], rtol: float | None = None, *, atol: float | None = None,
    report: Reporter = silent, message: str = "parity", merges: MergeReader | None = None,
) -> list[BatchError]:  # fmt: skip
    """Errors of a runner's first output at each batch size. With `merges` the models merge tokens as the graph does. Raises
    `UserError` for outputs of another shape than the model's."""
    runs = []
    for done, size in enumerate(sizes):
        report(message, done, len(sizes))
        x = pool[:size].contiguous()
        with following(merges, x):
            reference, own = with_own_error(yard.exact, yard.own, x, ties=yard.dtype == torch.float32)
        got = runner.run(x.numpy())[0]
        if got.shape != reference.shape:
            raise UserError(f"{runner.name} gives outputs {got.shape}, the model {reference.shape}; export it again")
        runs.append((size, got, reference, own))
    report(message, len(sizes), len(sizes))
    widest = max(own for *_, own in runs)
    return [
        batch_error(size, got, reference, own, widest, dtype=yard.dtype, rtol=rtol, atol=atol, safety=yard.safety) for size,
        got, reference, own in runs
    ]


@torch.inference_mode()
def check_parity(
    export_dir: Path | str, moee: MoeeModel, data: ImageSet, threads: int | None = None, report: Reporter = silent, *,
    sizes: Sequence[int] = DEFAULT_BATCHES, provider: str = "cpu", rtol: float | None = None, atol: float | None = None,
    min_route_agreement: float | None = None, group: Group = SOLO,
) -> ParityResult:  # fmt: skip
    """Compare torch and ONNX Runtime on images of `data`: outputs at the batch sizes, every routed layer on up to 8 images, and
    top-1 classes of up to 64 images. Weights in `tensorrt.onnx` must be the model's.

    Torch's classes come from the device of `group`. The float64 run, and torch's error in the runtime's type that sets the
    tolerances, are the CPU's: another device would judge the same export by other numbers.

    Raises `UserError` for a graph that does not belong to the model, `MissingDependency` for an absent provider.
    """
    folder = Path(export_dir)
    manifest = read_export(folder, verify=False)
    precision, int8 = manifest.get("precision", "fp32"), read_quantization(manifest, "moee")
    widened = precision == "bf16" and provider == "cpu"  # ONNX Runtime's CPU provider has no bfloat16 kernels
    refuse_foreign(folder, moee)
    refuse_unrouted(moee, min_route_agreement)
    yard = yardsticks(moee.model, precision, widened, int8)
    sizes = sorted(set(sizes))
    pool, distinct = image_pool(data, max(sizes[-1], min(len(data), AGREEMENT_IMAGES)))
    with ExitStack() as stack:
        plain = stack.enter_context(copied(load_ir(folder / PORTABLE), folder / PORTABLE, widened))
        runner = stack.enter_context(graph_runner(plain, threads, provider))
        merges = stack.enter_context(merge_reader(folder / PORTABLE, yard, threads, provider, widened))
        errors = output_errors(runner, yard, pool, sizes, rtol, atol=atol, report=report, merges=merges)
        agreement, images, notes = _class_agreement(runner, yard, moee, pool[:distinct], sizes[-1], group, merges=merges)
        name = f"{runner.name}, bfloat16 widened to float32" if widened else runner.name
    x = pool[: min(sizes[-1], LAYER_IMAGES)].contiguous()
    floor = MIN_ROUTE_AGREEMENT.get(precision, 0.0) if min_route_agreement is None else min_route_agreement
    with merge_reader(folder / PORTABLE, yard, threads, provider, widened) as again, following(again, x):
        judged, ties, form_problems = _layers(folder, yard, x, threads, provider, widened, report)
    ties = ties and min_route_agreement is None
    if precision == "fp32" and not all(e.passed for e in errors):
        with tapped_graph(folder / PORTABLE, list(yard.layers()[0])) as tapped:
            errors = _without_ties(tapped, folder / PORTABLE, yard, pool, errors, threads, provider)
    why = why_not_run(manifest, provider)
    operator = None
    if why == "":
        operator = _operator(folder, moee, yard, pool, sizes, rtol, atol, threads, provider, report)
    elif why is not None:
        operator = OperatorParity(skipped=why)
    arithmetic = ("int8 and " if int8 else "") + str(yard.dtype).removeprefix("torch.")
    rule = f"{yard.safety:g} times the largest error of torch in {arithmetic} against float64"
    if rtol is not None or atol is not None:
        rule = f"{atol or 0:g} + {rtol or 0:g} times the rms of the output"
    problems = check_weights(folder / TENSORRT, routed_layers(moee.model), dtype_of(precision)) + form_problems
    problems += check_merges(folder / TENSORRT, moee.model, dtype_of(precision))
    if int8 is not None:
        problems += check_int8([folder / TENSORRT, folder / PORTABLE], moee.model, int8, yard.dtype)
    return ParityResult(
        runtime=name,
        batches=errors,
        route_agreement={layer.name: layer.agreement for layer in judged if layer.routes},
        top1_agreement=agreement,
        images=images,
        precision=precision,
        arithmetic=arithmetic,
        layers=judged,
        weight_problems=problems,
        min_route_agreement=floor,
        rule=rule,
        only_ties=ties,
        notes=notes,
        belongs_to=export_ids(manifest),
        dense=not manifest["routed_layers"] and merges is None,
        merges=list(merges.judged.values()) if merges is not None else [],
        operator=operator,
    )


def _operator(
    folder: Path, moee: MoeeModel, yard: Yardsticks, pool: Tensor, sizes: Sequence[int], rtol: float | None, atol: float | None,
    threads: int | None, provider: str, report: Reporter,
) -> OperatorParity:  # fmt: skip
    """`runtime.onnx` as the portable graph is checked: outputs at each batch size, and the weights that it stores."""
    with ExitStack() as stack:
        runner = stack.enter_context(graph_runner(folder / RUNTIME, threads, provider))
        merges = stack.enter_context(merge_reader(folder / RUNTIME, yard, threads, provider))
        said: dict[str, Any] = {"report": report, "message": "parity of the operator", "merges": merges}
        errors, name = output_errors(runner, yard, pool, sizes, rtol, atol=atol, **said), runner.name
    if not all(e.passed for e in errors):
        with tapped_operator(folder, list(yard.layers()[0])) as tapped:
            errors = _without_ties(tapped, folder / RUNTIME, yard, pool, errors, threads, provider)
    problems = check_weights(folder / RUNTIME, routed_layers(moee.model), yard.dtype)
    problems += check_merges(folder / RUNTIME, moee.model, yard.dtype)
    wrong = [merge for merge in (merges.judged.values() if merges is not None else ()) if not merge.passed]
    problems += [WeightProblem(merge.name, "merges", merge.message) for merge in wrong]
    return OperatorParity(name, tuple(errors), tuple(problems))


def _layers(
    folder: Path, yard: Yardsticks, x: Tensor, threads: int | None, provider: str, widened: bool, report: Reporter
) -> tuple[list[LayerParity], bool, list[WeightProblem]]:
    """Every routed layer of the portable graph on one batch of images; whether its routes differ from float64's by near ties
    alone (the layers are then held against a float64 run with the runtime's routes); what is wrong with CLEAR-MoE's other form.
    """
    exact, own = yard.layers()
    names = list(exact)
    if not names:  # the dense model's own export
        return [], False, []
    with tapped_graph(folder / PORTABLE, names, widened) as path, graph_runner(path, threads, provider) as runner:
        got = taps_of(runner.run(x.numpy()), names)
    reference, by_torch = _hooked_run(yard.exact, names, x), _hooked_run(yard.own, names, x)
    run_by: dict[str, Any] = {"threads": threads, "provider": provider, "widened": widened}
    probes = probe_layers(folder / PORTABLE, exact, reference, yard.exact.dtype, **run_by)

    standard = standard_layers(folder, exact)

    def judge(name: str, held_against: dict[str, Tap]) -> LayerParity:
        reference, torch_tap, plain = held_against[name], by_torch[name], name in standard
        return layer_parity(
            name, exact[name], own[name], got[name], probes[name].tap, reference=reference, by_torch=torch_tap, plain=plain
        )

    judged = []
    for done, name in enumerate(names):
        if got[name].tokens.shape != reference[name].tokens.shape:
            raise UserError(f"{PORTABLE}: {name} gets {tuple(got[name].tokens.shape)} tokens, the model's layer another number")
        judged.append(judge(name, reference))
        report("layers", done + 1, len(names))
    problems = check_form(folder, standard, own, reference, yard.exact.dtype, **run_by)
    if yard.dtype == torch.float32 and any(layer.flips for layer in judged):
        with dictated(yard.exact, [got[name].route for name in names]):
            followed = _hooked_run(yard.exact, names, x)
        again = [judge(name, followed) for name in names]
        if only_ties(again):
            return again, True, problems
    return judged, False, problems


def _without_ties(
    tapped_file: Path, graph: Path, yard: Yardsticks, pool: Tensor, errors: list[BatchError], threads: int | None, provider: str
) -> list[BatchError]:
    """The errors of `graph` again, those that are too large with near ties between experts taken out; `tapped_file`: the graph
    that also outputs its taps."""
    names = list(yard.layers()[0])
    excused = []
    with ExitStack() as stack:
        tapped = stack.enter_context(graph_runner(tapped_file, threads, provider))
        plain = stack.enter_context(graph_runner(graph, threads, provider))
        merges = stack.enter_context(merge_reader(graph, yard, threads, provider))
        for error in errors:
            if not error.passed:
                x = pool[: error.batch].contiguous()
                taps, got = taps_of(tapped.run(x.numpy()), names), plain.run(x.numpy())[0]
                with following(merges, x):
                    error = excuse_ties(error, got, yard.exact(x).numpy(), yard.exact, x, taps=taps)
            excused.append(error)
    return excused


def _hooked_run(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tap]:
    """Taps of one forward pass of a model that may be wrapped, by the layers' names in the unwrapped one."""
    with hooked(model) as taps:
        model(x)
        return {name: taps[inner] for name, inner in zip(names, routed_layers(model), strict=True)}


def _class_agreement(
    runner: Runner, yard: Yardsticks, moee: MoeeModel, pool: Tensor, size: int, group: Group, *, merges: MergeReader | None
) -> tuple[float | None, int, list[str]]:
    """Share of the images of `pool` with the class that torch in the runtime's type gives, how many they are, and what may be
    said of it."""
    notes, images = [], len(pool)
    few = yard.own(pool[:LAYER_IMAGES].contiguous())
    if len(few) > 1 and bool((few == few[0]).all()):
        notes.append("the model gives every image the same output, so equal outputs show little; its layers were compared")
    if classes_told(moee.model, moee.probe) < 2:
        return None, images, notes
    ours, theirs = [], []
    with group.placed(yard.own):
        for part in pool.split(size):
            x = part.contiguous()
            with following(merges, x):
                by_torch = yard.own(x.to(group.device)).cpu()
            ours.append(logits(moee, by_torch))
            theirs.append(logits(moee, torch.from_numpy(runner.run(x.numpy())[0])))
    share = shared_answers(torch.cat(ours), torch.cat(theirs))
    if share is None:
        notes.append("top-1 agreement is not shown: the model gives every image the same class")
    return share, images, notes


def logits(moee: MoeeModel, outputs: Tensor) -> Tensor:
    """Logits [N, classes] float32 of a model's outputs: the outputs themselves, or the probe's."""
    outputs = outputs.float()
    return moee.probe.logits(outputs) if moee.probe is not None else outputs
