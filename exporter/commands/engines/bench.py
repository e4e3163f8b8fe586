"""`moee bench`: latency and throughput of the dense and the MoEE model, interleaved, with a verdict only where there is one."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from exporter.terminal.advice import after_bench
from exporter.terminal.flags import GATE_FAILED, OK, add_outputs, add_word, at_least, finite, several
from exporter.terminal.idle import NO_ENGINE, keep_defaults, refuse_idle
from exporter.terminal.ui import FittingTable, ProgressDisplay
from moee.bounds import BATCH, JOBS, RUNS, SECONDS
from moee.places.inputs import source_paths
from moee.places.output_file import OutputFile
from moee.progress import Reporter, silent
from moee.store.result_kinds import LATENCY

if TYPE_CHECKING:
    from moee.data.image_set import ImageSet

IN_PYTHON = "exporter.bench(EXPORT, IMAGES, model=RESULT) with what moee.extract or moee.load returned as RESULT"
TEXT = "latency and throughput of the dense and the MoEE model, interleaved"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("bench", help=TEXT, description=TEXT)
    sub.set_defaults(check=check, run=run, loads="exporter.timing.latency")
    sub.add_argument("path", help="folder that moee export wrote")
    sub.add_argument("--engine", metavar="DIR", help="time the engines that moee build wrote there; needs their GPU")
    sub.add_argument("--trust-engine", action="store_true", help="load an engine that engine.json does not vouch for: it is code")
    sub.add_argument("--provider", default="cpu", help="what runs the graphs: cpu, cuda or tensorrt of ONNX Runtime (cpu)")
    sub.add_argument("--batch", type=at_least(*BATCH), default=8, help="images of a batch (8)")
    beside = "another export of the same dense model, timed in the same turns; may be given several times. Prints what share of "
    beside += "the speed-up that its MACs allow each reaches"
    sub.add_argument("--beside", metavar="DIR", action="append", default=[], help=beside)
    sizes = "a table at several batch sizes, separated by commas (1,8,32 with --beside)"
    sub.add_argument("--batches", type=several(at_least(*BATCH)), metavar="LIST", help=sizes)
    sub.add_argument("--runs", "--iterations", type=at_least(*RUNS), default=40, help="pairs of runs, at least (40)")
    least = "seconds that pairs of runs take, at least (3)"
    sub.add_argument("--duration", type=finite(*SECONDS), default=3.0, metavar="S", help=least)
    flying = "requests in flight for throughput (2)"
    sub.add_argument("--streams", "--infStreams", type=at_least(*JOBS), default=2, help=flying)
    rate = "seconds of throughput, 0 for none (3)"
    sub.add_argument("--throughput", type=finite(*SECONDS), default=3.0, metavar="S", help=rate)
    sub.add_argument("--cuda-graph", "--useCudaGraph", action="store_true", help="replay engines as CUDA graphs")
    sub.add_argument("--profile", "--dumpProfile", action="store_true", help="also the time of every routed layer")
    sub.add_argument("--data", help="images to run on: routing depends on them (default: those of its tuning, else extraction)")
    add_word(sub)
    sub.add_argument("--threads", type=at_least(*JOBS), help="threads of ONNX Runtime (all cores)")
    sub.add_argument("--out", metavar="FILE", help="write latency.json here; an earlier one is overwritten")
    sub.add_argument("--force", action="store_true", help="replace an existing file of another kind")
    sub.add_argument("--fail-if-slower", action="store_true", help="exit code 1 if dense is faster beyond the noise")
    add_outputs(sub, lambda args: [_output(args)] if args.out is not None else [])
    keep_defaults(sub)


def check(args: argparse.Namespace) -> None:
    """Raise `UserError` for options that would do nothing beside the others."""
    if args.beside or args.batches:
        alone = "engine", "trust_engine", "cuda_graph", "profile", "out", "fail_if_slower", "batch", "streams", "throughput"
        refuse_idle(args, "for one export at one --batch, and this is a table of --beside and --batches", *alone)
    if args.engine is None:
        refuse_idle(args, NO_ENGINE, "trust_engine", "cuda_graph")
    else:
        refuse_idle(args, "for graphs that ONNX Runtime runs, and --engine names engines", "provider", "threads", "profile")
    if args.provider != "cpu":
        refuse_idle(args, f"for ONNX Runtime on the CPU, and --provider is {args.provider}", "profile")
    if args.throughput == 0:
        refuse_idle(args, "for the throughput, and --throughput 0 measures none", "streams")


def _output(args: argparse.Namespace) -> OutputFile:
    return OutputFile(args.out, LATENCY, args.force, source_paths(args.path, args.engine, args.data, *args.beside))


def run(args: argparse.Namespace, console: Console) -> int:
    from exporter.manifests import read_export, refuse_lost_dense
    from exporter.timing.latency import bench
    from exporter.verdict import MIN_PAIRS
    from moee.data.image_set import batches
    from moee.data.sources import located
    from moee.errors import UserError

    manifest, busy = read_export(args.path), _busy()
    refuse_lost_dense(manifest, args.path)
    if args.beside or args.batches:
        return _side_by_side(args, manifest, console, busy)
    if args.fail_if_slower and args.runs < MIN_PAIRS and args.duration <= 0:
        raise UserError(f"--fail-if-slower needs {MIN_PAIRS} pairs of runs or more, came --runs {args.runs}")
    with ProgressDisplay() as report:
        data = _data(args.data, manifest, args.path, report, args.word)
        images = next(batches(data, args.batch)).images.numpy() if data is not None else None
        result = bench(
            args.path, args.batch, runs=args.runs, threads=args.threads, images=images, report=report, duration_s=args.duration,
            provider=args.provider,
            engine=args.engine, cuda_graph=args.cuda_graph, streams=args.streams, throughput_s=args.throughput,
            profile=args.profile, named=located(data.name) if data is not None else "noise", trust_engine=args.trust_engine,
        )  # fmt: skip
    if data is None:
        console.print(f"on noise: {_why_noise(manifest)}", highlight=False, soft_wrap=True)
    console.print(latency_table(result))
    if result.throughput:
        rate = result.throughput
        console.print(
            f"throughput with {result.streams} in flight: dense {rate['dense']:.1f}, MoEE {rate['moee']:.1f} images a second"
        )
    if result.layers:
        console.print(_layer_table(result.layers))
    console.print(result.verdict.text, highlight=False)
    if busy:
        console.print(busy, highlight=False, soft_wrap=True)
    words = ["--model", args.word] if args.word is not None else []
    console.print(after_bench(result, args.path, words), highlight=False, soft_wrap=True)
    if args.out is not None:
        _output(args).write_json(result.to_json())
    if args.fail_if_slower and (result.verdict.winner == "dense" or not result.verdict.decidable):
        slower = "MoEE is slower than dense" if result.verdict.decidable else "whether MoEE is slower could not be told"
        console.print(f"FAILED: {slower}")
        return GATE_FAILED
    return OK


def _busy() -> str:
    """A sentence where more runs on this machine than it has processors for; it is asked before the timing."""
    from moee.parallel.machine import usable_cpus

    load, cpus = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, usable_cpus()
    if load <= cpus:
        return ""
    return f"others were at work here (load {load:.1f} on {cpus} CPUs before the timing): alone, both models take less time"


def _side_by_side(args: argparse.Namespace, manifest: dict[str, Any], console: Console, busy: str) -> int:
    """The table of `--beside` and `--batches`, and what makes its times longer."""
    from exporter.manifests import read_export, refuse_lost_dense
    from exporter.timing.side_by_side import BATCHES, side_by_side
    from exporter.verdict import MIN_PAIRS
    from moee.data.image_set import batches

    for folder in args.beside:
        refuse_lost_dense(read_export(folder), folder)
    sizes = args.batches or BATCHES
    with ProgressDisplay() as report:
        data = _data(args.data, manifest, args.path, report, args.word)
        images = next(batches(data, max(sizes))).images.numpy() if data is not None else None
        rows = side_by_side(
            [args.path, *args.beside], images, sizes, runs=args.runs, duration_s=args.duration, threads=args.threads,
            provider=args.provider, report=report,
        )  # fmt: skip
    if data is None:
        console.print(f"on noise: {_why_noise(manifest)}", highlight=False, soft_wrap=True)
    table = FittingTable("speed-up over dense, all in turns")
    for column in ("", "batch", "dense p50 ms", "p50 ms", "speed-up", "99 % interval", "ideal", "realised"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        ideal = (f"{row.ideal:.2f}x", f"{row.share:.2f}") if row.ideal and row.share else ("–", "–")
        verdict = row.verdict
        interval = f"{verdict.low:.2f} to {verdict.high:.2f}" if verdict.decidable else f"fewer than {MIN_PAIRS} rounds"
        figures = (f"{row.dense_p50_ms:.2f}", f"{row.p50_ms:.2f}", f"{verdict.ratio:.2f}x", interval)
        table.add_row(row.name, str(row.batch), *figures, *ideal)
    console.print(table)
    for name, runtime in dict.fromkeys((row.name, row.runtime) for row in rows):
        console.print(f"{name}: {runtime}", highlight=False, soft_wrap=True)
    if busy:
        console.print(busy, highlight=False, soft_wrap=True)
    return OK


def _why_noise(manifest: dict[str, Any]) -> str:
    """Why there are no images, and what to do."""
    from exporter.manifests import of_module

    if of_module(manifest):
        return f"its model is a module in Python. Routing depends on the images; give some there, with {IN_PYTHON}"
    return f"the data {manifest['data']!r} cannot be read here. Routing depends on the images; give some with --data"


def _data(
    given: str | None, manifest: dict[str, Any], folder: Path | str, report: Reporter = silent, word: str | None = None
) -> ImageSet | None:
    """Held-out images of --data, which must be readable, or of what the model was last made on, which may be elsewhere."""
    from exporter.manifests import image_record, of_module, refuse_module
    from moee.data.image_set import say_read
    from moee.errors import UserError

    if given:
        refuse_module(manifest, folder, IN_PYTHON)
    elif of_module(manifest):
        return None
    record = image_record(manifest, folder, word)
    try:
        data = record.images("val", given, report)
    except UserError:
        if given:
            raise
        return None
    say_read(val=data)
    return data


def latency_table(result: Any) -> Table:
    where = "GPU" if result.cuda_graph is not None else f"{result.threads} threads"
    title = f"latency, batch {result.batch}, {where}, {result.runtime}, {result.precision}"
    table = FittingTable(title)
    for column in ("", "p50 ms", "p90 ms", "p95 ms", "p99 ms"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in (("dense", result.dense_ms), ("MoEE", result.moee_ms)):
        table.add_row(name, *[f"{values[p]:.2f}" for p in ("p50", "p90", "p95", "p99")])
    ideal = f" of ideal {result.ideal_speedup:.2f}x" if result.ideal_speedup else ""
    table.caption = f"speed-up {result.speedup:.2f}x (p5 {result.speedup_p5:.2f}, p95 {result.speedup_p95:.2f}){ideal}"
    return table


def _layer_table(profile: Any) -> Table:
    table = FittingTable(f"routed layers, kernel time a batch ({profile.runs} profiled runs)")
    for column in ("layer", "dense ms", "MoEE ms", "speed-up"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer in profile.layers:
        table.add_row(layer.name, f"{layer.dense_ms:.3f}", f"{layer.moee_ms:.3f}", f"{layer.speedup:.2f}x")
    table.add_row("everything else", f"{profile.other_dense_ms:.3f}", f"{profile.other_moee_ms:.3f}", "")
    return table
