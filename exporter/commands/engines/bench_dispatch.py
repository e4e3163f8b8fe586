"""`moee bench-dispatch`: routing, permutation, products and combine of a CLEAR-MoE layer, apart, for every backend."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from exporter.terminal.flags import OK, add_outputs, add_word, at_least
from exporter.terminal.idle import keep_defaults, refuse_idle
from exporter.terminal.ui import FittingTable, ProgressDisplay
from moee.config import MOST_BATCH, MOST_WORKERS
from moee.errors import UserError
from moee.places.inputs import source_paths
from moee.places.output_file import OutputFile
from moee.store.result_kinds import DISPATCH

MOST_RUNS = 1_000_000
MOST_WIDTH = 1 << 20  # of a layer
TEXT = "stages of CLEAR-MoE dispatch: time, bytes, FLOPs, and which are memory-bound"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("bench-dispatch", help=TEXT, description=TEXT)
    sub.set_defaults(check=check, run=run, loads="exporter.timing.dispatch_bench")
    sub.add_argument("path", nargs="?", help="CLEAR-MoE model folder; its first layer on real tokens (default: random weights)")
    add_word(sub)
    sub.add_argument("--layer", help="name of the layer, with a model folder")
    sub.add_argument("--batch", type=at_least(1, MOST_BATCH), default=8, help="images, with a model folder (8)")
    tokens = "tokens of the random layer's input (2056: eight images of 257)"
    sub.add_argument("--tokens", type=at_least(1), default=2056, help=tokens)
    sub.add_argument("--dim", type=at_least(1, MOST_WIDTH), default=384, help="width of the random layer's tokens (384)")
    sub.add_argument("--hidden", type=at_least(1, MOST_WIDTH), default=1536, help="hidden neurons of the random layer (1536)")
    sub.add_argument("--experts", type=at_least(1, MOST_WIDTH), default=4, help="experts of the random layer (4)")
    sub.add_argument("--rank", type=at_least(1, MOST_WIDTH), default=160, help="rank that its experts share (160)")
    own = "rank that each of its experts has beside that (8)"
    sub.add_argument("--residual-rank", type=at_least(0, MOST_WIDTH), default=8, help=own)
    sub.add_argument("--backend", action="append", help="loop, sorted, grouped, masked, triton; repeatable (all but triton)")
    sub.add_argument("--runs", type=at_least(1, MOST_RUNS), default=30, help="runs of every stage (30)")
    clock = "1 times CPU seconds, which other load does not disturb (all cores, wall time)"
    sub.add_argument("--threads", type=at_least(1, MOST_WORKERS), help=clock)
    sub.add_argument("--out", metavar="FILE", help="write dispatch.json here; an earlier one is overwritten")
    sub.add_argument("--force", action="store_true", help="replace an existing file of another kind")
    add_outputs(sub, lambda args: [_output(args)] if args.out is not None else [])
    keep_defaults(sub)


def check(args: argparse.Namespace) -> None:
    """Raise `UserError` for options that would do nothing beside the others."""
    if args.path is None:
        refuse_idle(args, "for a layer of a model, whose folder is not given", "layer", "batch", "word")
    else:
        shape = "tokens", "dim", "hidden", "experts", "rank", "residual_rank"
        refuse_idle(args, f"for a layer of random weights, and {args.path} has layers of its own", *shape)


def _output(args: argparse.Namespace) -> OutputFile:
    return OutputFile(args.out, DISPATCH, args.force, source_paths(args.path))


def run(args: argparse.Namespace, console: Console) -> int:
    import torch

    from exporter.timing.dispatch_bench import bench_dispatch, synthetic_layer
    from exporter.timing.triton_dispatch import install
    from moee.layers.clear_dispatch import backend

    if args.path:
        layer, x = real_layer(args.path, args.layer, args.batch, args.word)
    else:
        if args.rank + args.residual_rank > min(args.dim, args.hidden):
            raise UserError(
                f"--rank {args.rank} plus --residual-rank {args.residual_rank} must lie in 1..{min(args.dim, args.hidden)}, "
                "the full rank"
            )
        layer = synthetic_layer(args.dim, args.hidden, args.experts, args.rank, args.residual_rank)
        x = torch.randn(args.tokens, args.dim, generator=torch.Generator().manual_seed(0))
    install()
    for name in args.backend or ():
        backend(name)  # refuses an unknown one before anything is measured
    with ProgressDisplay() as report:
        backends = args.backend or [n for n in ("loop", "sorted", "grouped", "masked") if _available(n)]
        result = bench_dispatch(layer, x, backends, args.runs, args.threads, report=report)
    machine = result.machine
    clock = "one thread, CPU time" if machine.threads == 1 else f"{machine.threads} threads, wall time"
    console.print(
        f"machine: {machine.peak_gflops:.0f} GFLOP/s, {machine.bandwidth_gb_s:.1f} GB/s, balance {machine.balance:.1f} FLOPs a "
        f"byte ({clock}, measured on CPU)"
    )
    console.print(stage_table(result))
    console.print(form_table(result))
    if args.out is not None:
        _output(args).write_json(result.to_json())
    return OK


def _available(name: str) -> bool:
    from moee.layers.clear_dispatch import BACKENDS

    return name in BACKENDS


def real_layer(path: str, name: str | None, batch: int, word: str | None = None) -> tuple[Any, Any]:
    """A layer of a saved model and its input tokens on the first held-out images. Raises `UserError` without such a layer."""
    import torch

    from moee.artifacts import checkpoint
    from moee.data.image_set import batches, say_read
    from moee.kinds.registry import kind_of
    from moee.layers.routed import routed_layers

    moee = checkpoint.load(path, word)
    layers = {n: layer for n, layer in routed_layers(moee.model).items() if kind_of(layer).name == "clear-moe"}
    if not layers:
        raise UserError(f"{path} has no CLEAR-MoE layer; make one with moee extract --method clear-moe")
    name = name or next(iter(layers))
    if name not in layers:
        raise UserError(f"--layer {name}: expected one of {', '.join(layers)}")
    seen: list[torch.Tensor] = []
    handle = layers[name].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    data = moee.record.images("val")
    say_read(val=data)
    images = next(batches(data, batch)).images
    with torch.no_grad():
        moee.model(images)
    handle.remove()
    x = seen[0].movedim(1, -1) if layers[name].channels_first else seen[0]
    return layers[name], x.reshape(-1, x.shape[-1]).contiguous()


def stage_table(result: Any) -> Table:
    s = result.shapes
    title = f"{s['tokens']} tokens, {s['dim']} to {s['hidden']}, {s['experts']} experts, ranks {s['up_rank']}+{s['up_residual']}"
    table = FittingTable(f"{title} and {s['down_rank']}+{s['down_residual']}")
    for column in ("backend", "stage", "p50 ms", "p95 ms", "MFLOP", "MB", "FLOPs/byte", "bound by"):
        table.add_column(column, justify="left" if column in ("backend", "stage", "bound by") else "right")
    for stage in result.stages:
        table.add_row(
            stage.backend, stage.stage, f"{stage.p50_ms:.3f}", f"{stage.p95_ms:.3f}", f"{stage.flops / 1e6:.1f}",
            f"{stage.bytes / 1e6:.2f}", f"{stage.intensity:.1f}", stage.bound,
        )  # fmt: skip
    return table


def form_table(result: Any) -> Table:
    table = FittingTable("the whole layer in ONNX Runtime, interleaved (measured on CPU)")
    for column in ("form", "MACs of dense", "p50 ms", "p95 ms", "speed-up", "p5 to p95"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for form in result.forms:
        table.add_row(
            form.form, f"{form.macs_share:.3f}", f"{form.p50_ms:.2f}", f"{form.p95_ms:.2f}", f"{form.speedup:.2f}x",
            f"{form.speedup_p5:.2f} to {form.speedup_p95:.2f}",
        )  # fmt: skip
    return table
