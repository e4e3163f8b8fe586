"""The command line: `moee COMMAND`. Each command parses its flags, calls one function and shows the result.

Exit codes: 0 ok, 1 a gate failed, 2 usage or bad input, 3 the environment lacks something, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from exporter.ui import ProgressDisplay, layer_table, number, percent, stage_table
from moee import __version__
from moee.config import PRESETS
from moee.errors import MissingDependency, UserError

OK, GATE_FAILED, BAD_INPUT, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130


def _out(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", required=True, help=f"folder for {what}; refused if it exists")
    parser.add_argument("--force", action="store_true", help="replace an existing output folder")


def _extract(args: argparse.Namespace, console: Console) -> int:
    from exporter.pretrained import resolve
    from moee.config import make_extract_config
    from moee.pipeline import run_extract

    names = (
        "seed", "tokens", "clustering", "components", "cluster_tokens", "min_cluster_size", "min_samples", "clusters",
        "criterion", "keep", "statistics", "compensation", "refit_lambda",
    )  # fmt: skip
    overrides = {name: getattr(args, name) for name in names}
    if args.clusters is not None and args.clustering is None:
        overrides["clustering"] = "kmeans"
    config = make_extract_config(args.preset, exclude=tuple(args.exclude) or None, **overrides)
    with ProgressDisplay() as report:
        spec = resolve(
            args.model, args.data, pretrained=args.pretrained, weights=args.weights, img_size=args.img_size, report=report
        )
        moee = run_extract(spec, args.data, config, args.out, args.force, report)
    console.print(layer_table(moee.info["layers"]))
    console.print(stage_table(moee.info, f"{spec.name} on {args.data}, preset {args.preset}"))
    if moee.info["skipped_images"]:
        console.print(f"skipped {len(moee.info['skipped_images'])} unreadable images")
    console.print(f"written to {args.out}; peak memory {moee.info['peak_memory_bytes'] / 2**30:.2f} GiB")
    return OK


def _finetune(args: argparse.Namespace, console: Console) -> int:
    from moee.config import FinetuneConfig, validated
    from moee.pipeline import run_finetune

    names = ("seed", "epochs", "batch_size", "lr", "weight_decay", "temperature", "train_router")
    values = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = validated(FinetuneConfig, values)
    with ProgressDisplay() as report:
        moee = run_finetune(args.path, config, args.out, args.data, args.force, report)
    console.print(stage_table(moee.info, f"{moee.spec.name} on {moee.data}"))
    console.print(f"written to {args.out}; best epoch {moee.info['stages']['tuned']['best_epoch']}")
    return OK


def _export(args: argparse.Namespace, console: Console) -> int:
    from exporter.onnx_export import export
    from moee import checkpoint

    with ProgressDisplay() as report:
        export(checkpoint.load(args.path), args.out, args.force, report, source=args.path)
    console.print(f"dense.onnx, portable.onnx and tensorrt.onnx written to {args.out}")
    return OK


def _verify(args: argparse.Namespace, console: Console) -> int:
    from exporter.onnx_export import MANIFEST, SCHEMA
    from exporter.parity import check_parity
    from moee import checkpoint
    from moee.artifact import read_manifest, write_json
    from moee.data import load_data, model_transform

    manifest = read_manifest(args.path, MANIFEST, SCHEMA)
    source = Path(args.model) if args.model else Path(args.path) / manifest["source"] if manifest["source"] else None
    if source is None:
        raise UserError(f"{args.path} does not say which model it was made from; give it with --model DIR")
    with ProgressDisplay() as report:
        moee = checkpoint.load(source)
        data = load_data(args.data or manifest["data"], model_transform(moee.model), "val")
        result = check_parity(args.path, moee, data, args.threads, report)
    table = Table(title=f"parity, torch and {result.runtime} (measured on CPU)")
    for column in ("batch", "max error", "mean error", "max error / rms"):
        table.add_column(column, justify="right")
    for b in result.batches:
        table.add_row(str(b.batch), f"{b.max_abs_error:.2e}", f"{b.mean_abs_error:.2e}", f"{b.relative:.2e}")
    console.print(table)
    worst = min(result.route_agreement, key=lambda name: result.route_agreement[name])
    console.print(
        f"route agreement: lowest {percent(result.route_agreement[worst])} ({worst}); "
        f"top-1 agreement: {percent(result.top1_agreement)} of {result.images} images"
    )
    if args.out:
        write_json(args.out, result.to_json())
    console.print("parity passed" if result else "parity FAILED")
    return OK if result else GATE_FAILED


def _bench(args: argparse.Namespace, console: Console) -> int:
    from exporter.latency import bench
    from exporter.onnx_export import MANIFEST, SCHEMA
    from moee.artifact import read_manifest, write_json
    from moee.data import Transform, batches, load_data

    manifest = read_manifest(args.path, MANIFEST, SCHEMA)
    given = manifest["input"]
    with ProgressDisplay() as report:
        images = None
        if manifest["data"] in ("digits", "photos"):
            transform = Transform(given["size"], tuple(given["mean"]), tuple(given["std"]), {})
            images = next(batches(load_data(manifest["data"], transform, "val"), args.batch)).images.numpy()
        result = bench(args.path, args.batch, args.runs, args.threads, images, report)
    console.print(_latency_table(result))
    if args.out:
        write_json(args.out, result.to_json())
    if args.fail_if_slower and result.speedup < 1:
        console.print(f"MoEE is slower than dense: {result.speedup:.2f}x")
        return GATE_FAILED
    return OK


def _latency_table(result: Any) -> Table:
    table = Table(title=f"latency, batch {result.batch}, {result.threads} threads, {result.runtime} (measured on CPU)")
    for column in ("", "p50 ms", "p95 ms"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in (("dense", result.dense_ms), ("MoEE", result.moee_ms)):
        table.add_row(name, f"{values['p50']:.2f}", f"{values['p95']:.2f}")
    ideal = f" of ideal {result.ideal_speedup:.2f}x" if result.ideal_speedup else ""
    table.caption = f"speed-up {result.speedup:.2f}x ({result.speedup_p5:.2f} to {result.speedup_p95:.2f}){ideal}"
    return table


def _doctor(args: argparse.Namespace, console: Console) -> int:
    from exporter.doctor import checks

    table = Table(title="moee doctor")
    for column in ("", "found", "to add it"):
        table.add_column(column)
    found = checks()
    for check in found:
        table.add_row(check.name, check.found or "missing", "" if check.found else escape(check.fix))
    console.print(table)
    return ENVIRONMENT if any(c.required and not c.found for c in found) else OK


def _demo(args: argparse.Namespace, console: Console) -> int:
    from exporter.demo import run_demo

    with ProgressDisplay() as report:
        result = run_demo(args.out, args.force, report, epochs=args.epochs)
    console.print(stage_table(result.moee.info, f"{result.summary['model']} on {result.summary['dataset']}"))
    console.print(_latency_table(result.latency))
    parity = result.parity
    console.print(
        f"parity {'passed' if parity else 'FAILED'}: max error {parity.max_abs_error:.2e}, "
        f"route agreement {number(parity.mean_route_agreement, 6)}, top-1 agreement {percent(parity.top1_agreement)}"
    )
    engine = result.summary["engine"]
    if engine:
        console.print(f"engine built on CPU by {engine['builder']}: {engine['plugin_layers']} plugin layers, {engine['path']}")
    console.print(f"summary written to {Path(args.out) / 'summary.json'}")
    return OK if parity else GATE_FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="moee", description="Extract experts from Vision Transformers and ship them.")
    parser.add_argument("--version", action="version", version=f"moee {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace, Console], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command("extract", _extract, "find experts in a dense model's MLPs")
    sub.add_argument("model", help="timm model name, or dinov2-s")
    sub.add_argument("--data", required=True, help="digits, photos, photos:N, an image folder or a timm.data dataset string")
    sub.add_argument("--pretrained", action="store_true", help="timm's pretrained weights")
    sub.add_argument("--weights", help="weights as a .safetensors file")
    sub.add_argument("--img-size", type=int, help="input size in pixels, for models that take it")
    sub.add_argument("--preset", default="compensated", help=f"one of {', '.join(PRESETS)}")
    sub.add_argument("--exclude", action="append", default=[], metavar="LAYER", help="leave this MLP or block dense; repeatable")
    sub.add_argument("--seed", type=int)
    sub.add_argument("--tokens", type=int, help="calibration tokens a layer (126080)")
    sub.add_argument("--clustering", help="hdbscan, kmeans or none (one expert)")
    sub.add_argument("--clusters", type=int, help="number of clusters; implies k-means")
    sub.add_argument("--components", type=int, help="principal components before clustering (50)")
    sub.add_argument("--cluster-tokens", type=int, help="tokens a layer that are clustered (6000)")
    sub.add_argument("--min-cluster-size", type=float, help="share of the clustered tokens (0.006)")
    sub.add_argument("--min-samples", type=int)
    sub.add_argument("--criterion", help="variance or output_variance")
    sub.add_argument("--keep", type=float, help="share of the variance that an expert keeps (0.95)")
    sub.add_argument("--statistics", help="cluster or routed")
    sub.add_argument("--compensation", help="none, mean or refit")
    sub.add_argument("--refit-lambda", type=float)
    _out(sub, "the extracted model")

    sub = command("finetune", _finetune, "distil the dense model into an extracted one")
    sub.add_argument("path", help="folder that moee extract wrote")
    sub.add_argument("--data", help="default: the data it was extracted on")
    sub.add_argument("--epochs", type=int)
    sub.add_argument("--batch-size", type=int)
    sub.add_argument("--lr", type=float)
    sub.add_argument("--weight-decay", type=float)
    sub.add_argument("--temperature", type=float)
    sub.add_argument("--seed", type=int)
    sub.add_argument("--train-router", action="store_true", default=None)
    _out(sub, "the tuned model")

    sub = command("export", _export, "write dense, portable and TensorRT ONNX graphs")
    sub.add_argument("path", help="folder that moee extract or finetune wrote")
    _out(sub, "the graphs")

    sub = command("verify", _verify, "parity of torch and ONNX Runtime; exit code 1 if it fails")
    sub.add_argument("path", help="folder that moee export wrote")
    sub.add_argument("--model", help="artifact it was exported from (default: the one its manifest names)")
    sub.add_argument("--data", help="default: the data it was extracted on")
    sub.add_argument("--threads", type=int)
    sub.add_argument("--out", help="write parity.json here")

    sub = command("bench", _bench, "latency of the dense and the MoEE graph, interleaved")
    sub.add_argument("path", help="folder that moee export wrote")
    sub.add_argument("--batch", type=int, default=8)
    sub.add_argument("--runs", type=int, default=40)
    sub.add_argument("--threads", type=int)
    sub.add_argument("--out", help="write latency.json here")
    sub.add_argument("--fail-if-slower", action="store_true", help="exit code 1 if MoEE is slower than dense")

    command("doctor", _doctor, "what is installed, what is missing, how to add it")

    sub = command("demo", _demo, "everything, on a real pretrained ViT-S and scikit-learn's digits")
    sub.add_argument("--epochs", type=int, default=2, help="epochs of fine-tuning")
    _out(sub, "all results")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(argv)
    console, errors = Console(), Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        return args.run(args, console)
    except UserError as error:
        if args.debug:
            raise
        errors.print(f"moee: {error}")
        return BAD_INPUT
    except MissingDependency as error:
        if args.debug:
            raise
        errors.print(f"moee: {error}")
        return ENVIRONMENT
    except KeyboardInterrupt:
        errors.print("moee: interrupted; earlier results are as they were")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
