"""`moee inspect`: MACs, parameters, experts and routing, layer by layer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from exporter.commands import OK, add_img_size
from exporter.ui import attention_table, number

TEXT = "MACs, parameters, experts and routing, layer by layer"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("inspect", help=TEXT, description=TEXT)
    sub.set_defaults(run=run)
    sub.add_argument("model", help="timm model name, dinov2-s, vit-scratch, or a folder that extract or finetune wrote")
    add_img_size(sub)
    sub.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, console: Console) -> int:
    import json
    from dataclasses import asdict

    from exporter.pretrained import ALIAS, TIMM_NAME
    from moee import checkpoint, scratch
    from moee.errors import UserError
    from moee.input_size import sized
    from moee.inspection import inspect_artifact, inspect_dense
    from moee.models import ModelSpec

    if args.img_size is not None and (Path(args.model).is_dir() or args.model == scratch.NAME):
        raise UserError(f"--img-size: {args.model} has a size of its own; leave it out")
    if Path(args.model).is_dir():
        result = inspect_artifact(checkpoint.load(args.model))
    else:
        kwargs: dict[str, Any] = {"img_size": 224, "num_classes": 0} if args.model == ALIAS else {}
        if args.model == scratch.NAME:
            kwargs = scratch.ScratchRecipe().model_kwargs()
        timm_name = {ALIAS: TIMM_NAME, scratch.NAME: scratch.TIMM_NAME}.get(args.model, args.model)
        spec = ModelSpec(name=args.model, timm_name=timm_name, kwargs=kwargs)
        result = inspect_dense(spec if args.img_size is None else sized(spec, args.img_size))
    if args.json:
        print(json.dumps(result.to_json(), indent=2))
        return OK
    _, height, width = result.shape
    table = Table(min_width=76, title=f"{result.model} at {height} x {width}")
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
    if result.attention:
        console.print(attention_table([asdict(a) for a in result.attention]))
    for name, figures in (("dense", result.dense), ("MoEE", result.moee)):
        if figures:
            console.print(f"{name}: {figures['macs'] / 1e9:.3f} GMACs an image, {figures['params'] / 1e6:.3f} M parameters")
    return OK
