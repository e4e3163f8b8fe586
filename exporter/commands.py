"""What each command does with its parsed flags: call one function, show the result, return the exit code."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from exporter.ui import ProgressDisplay, layer_table, number, percent, stage_table
from moee.errors import UserError

OK, GATE_FAILED, BAD_INPUT, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130


def extract(args: argparse.Namespace, console: Console) -> int:
    from exporter.pretrained import resolve
    from moee.config import make_extract_config
    from moee.pipeline import run_extract

    names = (
        "seed", "tokens", "clustering", "components", "cluster_tokens", "min_cluster_size", "min_samples", "clusters",
        "criterion", "keep", "statistics", "compensation", "routing", "eps", "refit_lambda", "refit_tokens",
        "method", "experts", "top_k", "split", "selector",
    )  # fmt: skip
    overrides = {name: getattr(args, name) for name in names}
    if args.clusters is not None and args.clustering is None:
        overrides["clustering"] = "kmeans"
    config = make_extract_config(args.preset, exclude=tuple(args.exclude) or None, **overrides)
    with ProgressDisplay() as report:
        spec = resolve(
            args.model, args.data, pretrained=args.pretrained, weights=args.weights, img_size=args.img_size, report=report
        )
        moee = run_extract(spec, args.data, config, args.out, args.force, report, jobs=args.jobs)
    console.print(layer_table(moee.info["layers"]))
    console.print(stage_table(moee.info, f"{spec.name} on {args.data}, preset {args.preset}"))
    if moee.info["skipped_images"]:
        console.print(f"skipped {len(moee.info['skipped_images'])} unreadable images")
    console.print(f"written to {args.out}; peak memory {moee.info['peak_memory_bytes'] / 2**30:.2f} GiB")
    return OK


def finetune(args: argparse.Namespace, console: Console) -> int:
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


def export(args: argparse.Namespace, console: Console) -> int:
    from exporter.onnx_export import export
    from moee import checkpoint

    with ProgressDisplay() as report:
        export(checkpoint.load(args.path), args.out, args.force, report, source=args.path)
    console.print(f"dense.onnx, portable.onnx and tensorrt.onnx written to {args.out}")
    return OK


def verify(args: argparse.Namespace, console: Console) -> int:
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
    table = Table(min_width=76, title=f"parity, torch and {result.runtime} (measured on CPU)")
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


def bench(args: argparse.Namespace, console: Console) -> int:
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
    title = f"latency, batch {result.batch}, {result.threads} threads, {result.runtime} (measured on CPU)"
    table = Table(min_width=76, title=title)
    for column in ("", "p50 ms", "p95 ms"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in (("dense", result.dense_ms), ("MoEE", result.moee_ms)):
        table.add_row(name, f"{values['p50']:.2f}", f"{values['p95']:.2f}")
    ideal = f" of ideal {result.ideal_speedup:.2f}x" if result.ideal_speedup else ""
    table.caption = f"speed-up {result.speedup:.2f}x ({result.speedup_p5:.2f} to {result.speedup_p95:.2f}){ideal}"
    return table


def doctor(args: argparse.Namespace, console: Console) -> int:
    from exporter.doctor import checks

    table = Table(min_width=76, title="moee doctor")
    for column in ("", "found", "to add it"):
        table.add_column(column)
    found = checks()
    for check in found:
        table.add_row(check.name, check.found or "missing", "" if check.found else escape(check.fix))
    console.print(table)
    return ENVIRONMENT if any(c.required and not c.found for c in found) else OK


def demo(args: argparse.Namespace, console: Console) -> int:
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


def build(args: argparse.Namespace, console: Console) -> int:
    from exporter.engine import BuildFailed, build_engines, require_backend
    from exporter.plugin_cache import ensure_plugin
    from exporter.profile import batch_profile
    from moee.artifact import refuse_existing

    require_backend(args.backend)
    refuse_existing(Path(args.out), args.force)
    batch = batch_profile(Path(args.path), args.min_shapes, args.opt_shapes, args.max_shapes)
    with ProgressDisplay() as report:
        plugin = Path(args.plugin) if args.plugin else ensure_plugin(_sms(args.sm), report)
        try:
            result = build_engines(
                Path(args.path), Path(args.out), plugin=plugin, backend=args.backend, batch=batch,
                timing_cache=Path(args.timing_cache) if args.timing_cache else None, force=args.force,
                progress=lambda text: report.line(text),
            )  # fmt: skip
        except BuildFailed as error:
            console.print(f"build FAILED: {error}", markup=False)
            return GATE_FAILED
    table = Table(min_width=76, title=f"engines by {result.builder}, batch {'/'.join(map(str, batch))}")
    for column in ("", "file", "MiB", "build s"):
        table.add_column(column)
    for name, engine in (("dense", result.dense), ("MoEE", result.moee)):
        table.add_row(name, engine.file, f"{engine.size_bytes / 2**20:.1f}", f"{engine.build_s:.1f}")
    console.print(table)
    console.print(f"{result.plugin_layers} plugin layers; target: {result.target}; written to {args.out}")
    return OK


def _sms(text: str | None) -> tuple[int, ...] | None:
    """`87,89` to (87, 89); None and `all` mean every SM that ships."""
    if text in (None, "all"):
        return None
    try:
        return tuple(int(part) for part in str(text).replace("sm_", "").split(","))
    except ValueError as error:
        raise UserError(f"--sm {text}: expected numbers such as 87 or 87,89, or all") from error


def plugin_build(args: argparse.Namespace, console: Console) -> int:
    import shutil

    from exporter.plugin_cache import ensure_plugin

    with ProgressDisplay() as report:
        library = ensure_plugin(_sms(args.sm), report)
    if args.out:
        target = Path(args.out)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)
        library = target
    console.print(f"plugin: {library} ({library.stat().st_size / 2**20:.1f} MiB)", soft_wrap=True)
    return OK


def plugin_bundle(args: argparse.Namespace, console: Console) -> int:
    from exporter.plugin_cache import ensure_kernels
    from plugins.bundle import write_bundle

    sms = _sms(args.sm)
    if sms is None or len(sms) != 1:
        raise UserError(f"--sm {args.sm}: a bundle is for one SM, for example --sm 87")
    with ProgressDisplay() as report:
        write_bundle(Path(args.out), sms[0], ensure_kernels(sms, report), args.force)
    console.print(f"bundle for sm_{sms[0]} written to {args.out}; its README says how to compile it on the device")
    return OK


def inspect(args: argparse.Namespace, console: Console) -> int:
    import json

    from exporter.pretrained import ALIAS, TIMM_NAME
    from moee import checkpoint
    from moee.inspection import inspect_artifact, inspect_dense
    from moee.models import ModelSpec

    if Path(args.model).is_dir():
        result = inspect_artifact(checkpoint.load(args.model))
    else:
        kwargs = {} if args.img_size is None else {"img_size": args.img_size}
        if args.model == ALIAS:
            kwargs = {"img_size": args.img_size or 224, "num_classes": 0}
        timm_name = TIMM_NAME if args.model == ALIAS else args.model
        result = inspect_dense(ModelSpec(name=args.model, timm_name=timm_name, kwargs=kwargs))
    if args.json:
        print(json.dumps(result.to_json(), indent=2))
        return OK
    table = Table(min_width=76, title=f"{result.model} at {result.size} x {result.size}")
    for column in ("layer", "tokens", "MMACs", "of", "experts", "union", "widths", "balance", "entropy"):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for layer in result.layers:
        widths = f"{layer.min_width}..{layer.max_width}" if layer.experts else str(layer.hidden)
        table.add_row(
            layer.name, str(layer.tokens), f"{layer.macs / 1e6:.1f}", f"{layer.dense_macs / 1e6:.1f}",
            str(layer.experts or "dense"), str(layer.union or layer.hidden), widths,
            number(layer.balance, 2), number(layer.entropy, 2),
        )  # fmt: skip
    console.print(table)
    for name, figures in (("dense", result.dense), ("MoEE", result.moee)):
        if figures:
            console.print(f"{name}: {figures['macs'] / 1e9:.3f} GMACs an image, {figures['params'] / 1e6:.3f} M parameters")
    return OK
