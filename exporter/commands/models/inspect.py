"""`moee inspect`: MACs, parameters, experts and routing, layer by layer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from exporter.figures import macs_unit
from exporter.terminal.flags import NAMES, OK, add_weights, add_word, model_flags, options_of, speak
from exporter.terminal.ui import FittingTable, attention_table, number

TEXT = "MACs, parameters, experts and routing, layer by layer"


def add_parser(subparsers: Any) -> None:
    sub = subparsers.add_parser("inspect", help=TEXT, description=TEXT)
    sub.set_defaults(run=run, loads="moee.artifacts.inspection")
    sub.add_argument("model", help=f"{NAMES}, vit-, swin- or convnext-scratch, or a folder that extract or finetune wrote")
    add_weights(sub)
    add_word(sub)
    sub.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, console: Console) -> int:
    import json
    from dataclasses import asdict

    from exporter.pretrained import layout_of
    from moee.artifacts import checkpoint
    from moee.artifacts.inspection import inspect_artifact, inspect_dense
    from moee.errors import UserError
    from moee.mlps.find import described, grouped

    if Path(args.model).is_dir():
        given = model_flags(args)
        if given:
            raise UserError(f"{given[0]}: {args.model} has a size of its own, and weights and classes; leave it out")
        result = inspect_artifact(checkpoint.load(args.model, args.word))
    else:
        if args.word is not None:
            raise UserError(f"--model {args.word} is for a folder that extract wrote; give it in the place of {args.model}")
        options = options_of(args)
        if options.pretrained or options.random_weights is not None:
            flag = next(flag for flag in options.sources if flag != "--checkpoint")
            raise UserError(f"{flag}: inspect works by shapes alone, which no weights change; leave it out")
        result = inspect_dense(layout_of(args.model, options, speak(console, quiet=args.json)))
    if args.json:
        print(json.dumps(result.to_json(), indent=2))
        return OK
    _, height, width = result.shape
    table = FittingTable(f"{result.model} at {height} x {width}")
    for column in ("layer", "tokens", "MMACs", "of", "experts", "union", "widths", "balance", "entropy"):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for layer in result.layers:
        widths = f"{layer.min_width}..{layer.max_width}" if layer.experts else str(layer.hidden)
        tokens = f"{layer.tokens} of {layer.tokens + layer.merged}" if layer.merged else str(layer.tokens)
        table.add_row(
            layer.name, tokens, f"{layer.macs / 1e6:.1f}", f"{layer.dense_macs / 1e6:.1f}",
            str(layer.experts or "dense"), str(layer.union or layer.hidden), widths,
            number(layer.balance, 2), number(layer.entropy, 2),
        )  # fmt: skip
    console.print(table)
    if result.attention:
        console.print(attention_table([asdict(a) for a in result.attention]))
    if result.merged_tokens:
        console.print(f"tokens merged block by block: {' '.join(map(str, result.merged_tokens))}", markup=False)
    gated = [layer.name for layer in result.layers if layer.gated and not layer.experts]
    if gated:
        console.print(f"gated, which only --preset static and --method corp cut: {grouped(gated)}", markup=False)
    if result.uncut:
        console.print(f"stays dense: {described(result.uncut)}", markup=False)
    for name, figures in (("dense", result.dense), ("MoEE", result.moee)):
        if figures:
            unit, letter = macs_unit(figures["macs"])
            macs = f"{figures['macs'] / unit:.3f} {letter}MACs"
            console.print(f"{name}: {macs} an image, {figures['params'] / 1e6:.3f} M parameters")
    return OK
