"""`moee verify`: is this export still the model it was made from, and accurate enough? Exit code 1 if a gate fails."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from exporter.terminal.flags import (
    GATE_FAILED,
    OK,
    add_device,
    add_outputs,
    add_ranks,
    add_shapes,
    at_least,
    check_outputs,
    finite,
    rank_display,
    show_skipped,
)
from exporter.terminal.idle import NO_ENGINE, given_flags, keep_defaults, refuse_idle
from exporter.terminal.ui import FittingTable, percent, within
from moee.bounds import AGREEMENT, DROP, IMAGES, JOBS
from moee.config import MOST_FACTOR
from moee.errors import MissingDependency, UserError
from moee.measure.accuracy import drop_in_words
from moee.places.inputs import source_paths
from moee.places.output_file import OutputFile
from moee.places.output_folder import OutputFolder
from moee.store.result_kinds import PARITY, VERIFY

RESULT = "RESULT, IMAGES) with what moee.extract or moee.load returned as RESULT"
TEXT = "parity, routes and accuracy of an export, and of an engine; exit code 1 if a gate fails"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("verify", help=TEXT, description=TEXT)
    sub.set_defaults(check=_check, run=run, loads="exporter.verification")
    sub.add_argument("path", help="folder that moee export wrote; with --quick also a model, engines, a bundle, or a file of one")
    sub.add_argument("more", nargs="*", metavar="PATH", help="further paths, with --quick alone")
    what = "take seconds: manifest, hashes, graphs, the operator's contract, parity on random images; no accuracy"
    sub.add_argument("--quick", action="store_true", help=what)
    sub.add_argument("--engine", metavar="DIR", help="also run the engine that moee build wrote there; needs its GPU")
    sub.add_argument("--trust-engine", action="store_true", help="load an engine that engine.json does not vouch for: it is code")
    what = "artifact it was exported from (default: the one its manifest names), or package.module:function; repeatable"
    sub.add_argument("--model", action=ArtifactOrFunction, metavar="DIR", help=what)
    sub.set_defaults(word=None)
    sub.add_argument("--data", help="images to verify on (default: what the model was tuned on, else extracted on)")
    sub.add_argument("--images", type=at_least(*IMAGES), default=1000, help="labelled images for accuracy, 0 for none (1000)")
    sub.add_argument("--provider", default="cpu", help="what runs the graphs: cpu, cuda or tensorrt of ONNX Runtime (cpu)")
    sub.add_argument("--max-drop", type=finite(*DROP), metavar="POINTS", help="fail if top-1 falls by more percentage points")
    fewer = "fail if a smaller share of the tokens takes the same expert (fp32: 0.9999; else none)"
    sub.add_argument("--min-route-agreement", type=finite(*AGREEMENT), metavar="SHARE", help=fewer)
    allowed = "allow atol + rtol x rms of the output instead of 8 times torch's own error (0)"
    sub.add_argument("--rtol", type=finite(0, MOST_FACTOR), help=allowed)
    sub.add_argument("--atol", type=finite(0, MOST_FACTOR), help=allowed)
    add_shapes(sub)
    sub.add_argument("--bisect", action="store_true", help="show every routed layer, and name the first that deviates")
    what = "threads of ONNX Runtime and torch, in each rank (all cores; under torchrun 1)"
    sub.add_argument("--threads", type=at_least(*JOBS), help=what)
    place = "where torch's own classes are computed; its float64 run and what sets tolerances stay on the CPU"
    add_device(sub, what=place)
    add_ranks(sub, threads=False)
    sub.add_argument("--out", metavar="DIR", help="write parity.json, junit.xml and summary.md there (or FILE.json alone)")
    sub.add_argument("--force", action="store_true", help="replace an earlier result in --out, or FILE.json of another kind")
    add_outputs(sub, lambda args: [_output(args)] if args.out is not None else [])
    keep_defaults(sub)


class ArtifactOrFunction(argparse.Action):
    """An artifact's folder, or the function of the user's own that its model comes from (`add_word`)."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        function = ":" in values and "/" not in values and not Path(values).exists()
        setattr(namespace, "word" if function else self.dest, values)


def _output(args: argparse.Namespace) -> OutputFolder | OutputFile:
    inputs = source_paths(args.path, args.engine, args.model, args.data)
    if args.out.endswith(".json"):
        return OutputFile(args.out, PARITY, args.force, inputs)
    return OutputFolder(args.out, VERIFY, args.force, inputs)


def _check(args: argparse.Namespace) -> None:
    """Raise `UserError` for options of the whole verification beside --quick, for several folders without it, and for trust in an
    engine that is not named."""
    if not args.quick and args.more:
        raise UserError(f"{args.more[0]}: expected one export, came {1 + len(args.more)}; give one, or --quick")
    whole = [name for name in args.kept if name not in ("quick", "model")]
    if args.quick and (beside := given_flags(args, *whole)):
        raise UserError(f"--quick does not take {beside[0]}; leave one of them out")
    if args.engine is None:
        refuse_idle(args, NO_ENGINE, "trust_engine")
    if args.quick and args.more and (args.model is not None or args.word is not None):
        raise UserError(f"--model is of one export, and --quick came with {1 + len(args.more)} paths; give one")


def _run_quick(args: argparse.Namespace, console: Console) -> int:
    """Check each artifact once, however many of its files are named."""
    from exporter.verification.quick import artifact_at, quick_check

    folders = list(dict.fromkeys(artifact_at(path)[0] for path in (args.path, *args.more)))
    passed = True
    for folder in folders:
        result = quick_check(folder, args.model, args.word)
        console.print(f"{folder}, {result.what}: {'passed' if result else 'FAILED'}", highlight=False, soft_wrap=True)
        for mark, lines in (("checked", result.done), ("FAILED", result.failures), ("not checked", result.not_done)):
            for line in lines:
                console.print(f"  {mark}: {line}", highlight=False, soft_wrap=True)
        passed = passed and result.passed
    console.print(f"quick check {'passed' if passed else 'FAILED'}")
    return OK if passed else GATE_FAILED


def run(args: argparse.Namespace, console: Console) -> int:
    if args.quick:
        return _run_quick(args, console)
    from exporter.verification.write import write_result
    from moee.parallel.group import Parcel
    from moee.parallel.joining import joined

    with joined(args.rank_timeout, _rank_threads(args), args.torch_device) as group, rank_display(group) as report:
        with _error_report(args) if group.leader else nullcontext():
            result = _verified(args, group, report)
        with group.agreed():
            if group.leader and args.out is not None:
                write_result(_output(args), result)
        passed = group.broadcast(Parcel(bool(result)) if group.leader else None).body
    if result is not None:
        _show(console, result, args.bisect)
        console.print("parity passed" if result.parity else "parity FAILED")
        console.print("verify passed" if result else "verify FAILED")
    return OK if passed else GATE_FAILED


def _rank_threads(args: argparse.Namespace) -> int | None:
    """Threads of a rank; None leaves a process of its own as it is: --threads is then ONNX Runtime's alone."""
    from moee.parallel.joining import launched

    return args.threads if launched() else None


def _verified(args: argparse.Namespace, group: Any, report: Any) -> Any:
    """Read the export, its model and the data, and verify; None on ranks other than 0."""
    import torch

    from exporter.manifests import read_export, refuse_lost_dense, refuse_module
    from exporter.timing.profile import batch_profile
    from exporter.verification.suite import verify_ranks
    from moee.artifacts import checkpoint
    from moee.data.image_set import say_read
    from moee.methods.exchange import check_same_data
    from moee.parallel.joining import launched

    with group.agreed():
        manifest = read_export(args.path)
        refuse_lost_dense(manifest, args.path)
        refuse_module(manifest, args.path, f"exporter.verify({args.path!r}, {RESULT}")
        if group.leader:
            check_outputs(args)
        source = Path(args.model) if args.model else Path(args.path) / manifest["source"] if manifest["source"] else None
        if source is None:
            saved = "a folder that moee extract, finetune, or moee.save in Python wrote"
            raise UserError(f"{args.path} does not say which model it was made from; give that with --model DIR, {saved}")
        sizes = batch_profile(Path(args.path), args.min_shapes, args.opt_shapes, args.max_shapes)
        moee = checkpoint.load(source, args.word)
        data = replace(moee.record, source=manifest["data"]).images("val", args.data, report)
        data.workers = args.workers
        if group.leader:
            say_read(val=data)
    check_same_data(data, group)
    return verify_ranks(
        group, args.path, moee, data, sizes=sizes, provider=args.provider,
        threads=torch.get_num_threads() if launched() else args.threads, rtol=args.rtol, atol=args.atol,
        max_drop_pp=args.max_drop, min_route_agreement=args.min_route_agreement, images=args.images, engine=args.engine,
        report=report, trust_engine=args.trust_engine,
    )  # fmt: skip


@contextmanager
def _error_report(args: argparse.Namespace) -> Iterator[None]:
    """A verification that breaks off leaves junit.xml with the error in the folder --out, as test runners do."""
    from exporter.verification.junit import error_junit

    started = time.perf_counter()
    try:
        yield
    except (UserError, MissingDependency) as error:
        output = _output(args) if args.out is not None else None
        if isinstance(output, OutputFolder):
            with output.write() as folder:
                report = error_junit(Path(args.path).name, error, time.perf_counter() - started)
                (folder / "junit.xml").write_text(report, encoding="utf-8")
        raise


def _show(console: Console, result: Any, layers: bool) -> None:
    parity = result.parity
    table = FittingTable(f"parity of {parity.runtime} with torch, {parity.precision}, against float64")
    for column in ("batch", "max error", "mean error", "p99", "allowed", "torch's own"):
        table.add_column(column, justify="right")
    for b in parity.batches + (result.engine.batches if result.engine else []):
        figures = (b.max_abs_error, b.mean_abs_error, b.p99_abs_error, b.tolerance_abs, b.torch_max_abs_error)
        table.add_row(str(b.batch), *[f"{v:.2e}" for v in figures])
    console.print(table)
    if layers:
        console.print(_layer_table(parity.layers))
    worst = min(parity.route_agreement, key=lambda name: parity.route_agreement[name], default=None)
    console.print(
        f"route agreement: lowest {percent(parity.route_agreement.get(worst))} ({worst or 'no layer has more than one expert'}); "
        f"top-1 agreement with torch: {percent(parity.top1_agreement)} of {parity.images} images"
    )
    if parity.merges:
        matched, wrong = (sum(getattr(merge, part) for merge in parity.merges) for part in ("matched", "wrong"))
        said = f"matchings of tokens in {len(parity.merges)} blocks: {wrong} of {matched:,} wrong by more than rounding"
        console.print(said, highlight=False, soft_wrap=True)
    if parity.operator is not None:
        by = parity.operator
        largest, verdict = max((b.max_abs_error for b in by.batches), default=0.0), "passed" if by.passed else "FAILED"
        text = f"not run here: {by.skipped}" if by.skipped else f"max error {largest:.2e}, {verdict}"
        console.print(f"runtime.onnx ({by.runtime or 'the operator for ONNX Runtime'}): {text}", highlight=False, soft_wrap=True)
    for note in parity.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    a = result.accuracy
    if a:
        drop, interval = drop_in_words(a.drop_pp, a.drop_interval_pp)
        console.print(
            f"accuracy on {a.counted}: dense {within(a.dense_top1.value, a.dense_top1.interval)}, "
            f"MoEE {within(a.moee_top1.value, a.moee_top1.interval)}, {drop} ({interval}), "
            f"agreement {percent(a.agreement.value)}, KL {a.kl:.1e}"
        )
    else:
        console.print(f"accuracy: not measured, {result.no_accuracy}")
    for case in result.cases():
        if case.failure:
            console.print(f"FAILED {case.group}, {case.name}: {case.failure}", highlight=False)
    if result.data_read:
        show_skipped(console, result.data_read)
    deviation = parity.first_deviation
    if deviation:
        text = f"first deviation: {deviation.layer} ({deviation.where}): {deviation.message}"
        console.print(text, highlight=False)
    elif layers:
        console.print("no layer deviates")


def _layer_table(layers: Any) -> Table:
    table = FittingTable("routed layers: alone, on the inputs that the runtime gave them")
    for column in ("layer", "max error", "allowed", "routes equal", "flips", "wrong", "input drift"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer in layers:
        table.add_row(
            layer.name, f"{layer.local.max_abs_error:.2e}", f"{layer.local_tolerance:.2e}", percent(layer.agreement),
            str(layer.flips), str(layer.wrong_routes), f"{layer.input_drift:.2e}",
        )  # fmt: skip
    return table
