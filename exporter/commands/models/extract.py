"""`moee extract`: find experts in a dense model's MLPs."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from rich.console import Console
from rich.table import Table

from exporter.terminal.advice import after_extract
from exporter.terminal.flags import (
    OK,
    add_device,
    add_model,
    add_out,
    add_outputs,
    add_ranks,
    add_trial,
    at_least,
    check_outputs,
    classes_of,
    model_inputs,
    model_of,
    rank_display,
    show_skipped,
    trial_of,
)
from exporter.terminal.options import Known, add_options, flag_of, given_options
from exporter.terminal.space import add_memory, add_scratch
from exporter.terminal.ui import FittingTable, attention_table, layer_notes, layer_table, number, percent, stage_table
from moee.bounds import JOBS
from moee.errors import UserError
from moee.methods.idle import refuse_idle_options
from moee.methods.recipe import ALONE, PARTS, make_recipe, read_recipe
from moee.methods.registry import DEFAULT, METHODS, presets
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder
from moee.places.placement import Output
from moee.store.result_kinds import MODEL

TEXT = "find experts in a dense model's MLPs"


def add_parser(subparsers: Any, shown: str | None = None) -> None:
    """`shown`: the method or preset whose options the help shows."""
    sub = subparsers.add_parser("extract", help=TEXT, description=TEXT)
    sub.set_defaults(run=run, loads="moee.stages.extract")
    add_model(sub)
    how = sub.add_argument_group("what is done to the model")
    names = ",".join(method.name for method in METHODS if method.cuts in ALONE)
    text = f"what is done; its options are below, and --method NAME --help shows another one's (default: {DEFAULT.name})"
    how.add_argument("--method", choices=Known(names.split(",")), metavar=f"{{{names}}}", help=text)
    usual = next(iter(DEFAULT.presets))
    several = {m.name: ", ".join(m.presets) for m in METHODS if set(m.presets) - {m.name}}
    named = "; ".join(f"{listed} of {name}" for name, listed in several.items())
    text = (
        f"options under one name, which --preset NAME --help shows: {named}; others are called as their method, and given with "
        f"--method (default: {usual})"
    )
    how.add_argument("--preset", choices=Known(presets()), metavar="NAME", help=text)
    alone = "takes no method and no options"
    how.add_argument("--plan", metavar="FILE", help=f"the winner of this plan.json of moee plan; {alone}")
    how.add_argument("--recipe", metavar="FILE", help=f"the steps of this TOML file (docs/recipes.md); {alone}")
    add_method_options(sub, shown)
    side = "layers clustered side by side (1); each takes memory of its own"
    sub.add_argument("--jobs", type=at_least(*JOBS), default=1, help=side)
    add_device(sub)
    add_trial(sub)
    add_scratch(sub)
    add_memory(sub)
    add_ranks(sub)
    add_out(sub, "the extracted model")
    add_outputs(sub, _outputs)


def _outputs(args: argparse.Namespace) -> list[Output]:
    return [OutputFolder(args.out, MODEL, args.force, (*model_inputs(args), *source_paths(args.plan, args.recipe)))]


def add_method_options(sub: argparse.ArgumentParser, shown: str | None) -> None:
    """The options of every method; help shows those of the method called `shown`, and of what goes beside it."""
    first = next((m for m in METHODS if shown in (m.name, *m.also)), presets().get(shown or "", DEFAULT))
    if first.cuts not in ALONE:
        first = DEFAULT
    preset = shown if shown in first.presets else next(iter(first.presets), None)
    of = f"--method {first.name}" + (f" --preset {preset}" if len(first.presets) > 1 else "")
    options = sub.add_argument_group(f"options of {of}: {first.summary}")
    add_options(options, first.options, said=first.presets[preset] if preset else {})
    for method in (m for m in METHODS if m.cuts in PARTS[:-1] and m is not first):
        add_options(sub.add_argument_group(f"in addition: {method.summary}"), method.options)
    for method in METHODS:
        add_options(sub, method.options, hidden=True)
    lines = [f"  {method.name}: {method.summary}" for method in METHODS if method.cuts in ALONE]
    sub.epilog = "\n".join(["methods, each with its own options (moee extract --method NAME --help):", *lines])
    sub.formatter_class = argparse.RawDescriptionHelpFormatter


def run(args: argparse.Namespace, console: Console) -> int:
    from moee.parallel.joining import joined
    from moee.planning.plan import planned_on, read_plan
    from moee.stages.extract import run_extract
    from moee.tokens.block import merged_tokens

    values = given_options(args, [method.options for method in METHODS])
    chosen = {name: value for name in ("method", "preset") if (value := getattr(args, name)) is not None} | values
    sources = [name for name in ("plan", "recipe") if getattr(args, name) is not None]
    if sources and (chosen or len(sources) > 1):
        rest = [*sources[1:], *chosen]
        raise UserError(f"--{sources[0]} decides the method and its options; leave {', '.join(map(flag_of, rest))} out")
    recipe = make_recipe(args.method, args.preset, values) if not sources else read_recipe(args.recipe) if args.recipe else None
    if recipe is not None and not sources:
        refuse_idle_options(recipe, values)
    classes, planned = classes_of(args), None
    with joined(args.rank_timeout, args.threads, args.torch_device) as group, rank_display(group) as report:
        with group.agreed():
            if group.leader:
                check_outputs(args)
        spec = _shared_spec(args, report, group, console)
        if args.plan:
            with group.agreed():
                recipe = read_plan(args.plan, spec)
            planned = planned_on(args.plan)
        assert recipe is not None, "from the flags, a recipe's file or a plan"
        moee = run_extract(
            spec, args.data, recipe, args.out, force=args.force, report=report, session=None, jobs=args.jobs, group=group,
            workers=args.workers, classes=classes, trial=trial_of(args), memory=args.memory, planned=planned,
        )  # fmt: skip
    if not group.leader:
        return OK
    if any("ranks" in layer for layer in moee.info["layers"]):
        console.print(clear_table(moee.info["layers"]))
    if moee.info["layers"]:
        console.print(layer_table(moee.info["layers"]))
    if ranks := [layer["low_ranks"] for layer in moee.info["layers"] if layer.get("low_ranks")]:
        console.print(f"ranks of the two maps, layer by layer: {' '.join(f'{up}+{down}' for up, down in ranks)}", highlight=False)
    merged = merged_tokens(moee.model)
    if merged:
        console.print(f"tokens merged block by block: {' '.join(map(str, merged))}", highlight=False)
    for note in layer_notes(moee.info["layers"]):
        console.print(note, highlight=False)
    if "attention" in moee.info:
        console.print(attention_table(moee.info["attention"]))
    assert moee.recipe is not None, "just extracted by one"
    what = "as planned" if args.plan else f"preset {args.preset}" if args.preset else f"method {moee.recipe.method.name}"
    console.print(stage_table(moee.info, f"{spec.name} on {args.data}, {what}"))
    show_skipped(console, moee.info["data_read"])
    words = ["--model", args.model] if spec.library == "python" else []
    if recipe.tune is not None:
        command = shlex.join(["moee", "finetune", args.out, *words, "--recipe", args.recipe, "--out", "DIR"])
        console.print(f"the recipe tunes it too: {command}", highlight=False, soft_wrap=True)
    console.print(f"written to {args.out}; peak memory {moee.info['peak_memory_bytes'] / 2**30:.2f} GiB", highlight=False)
    fields = () if args.plan or args.recipe else type(recipe.cut).model_fields
    less = next((f"--{name.replace('_', '-')}" for name in ("target_macs", "token_macs") if name in fields), "")
    console.print(after_extract(moee.info, args.out, words, less), highlight=False, soft_wrap=True)
    return OK


def _shared_spec(args: argparse.Namespace, report: Any, group: Any, console: Console) -> Any:
    """The model's spec on every rank; rank 0 goes first, so that what has to be fetched is fetched once."""
    spec = None
    for turn in (group.leader, not group.leader):
        with group.agreed():
            if turn:
                spec = model_of(args, report, console)
    return spec


def clear_table(layers: list[dict[str, Any]]) -> Table:
    """Scores, ranks and router accuracy of every layer."""
    table = FittingTable("scores and ranks")
    for column in ("layer", "near zero", "silhouette", "sensitivity", "score", "up", "down", "router"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer in layers:
        score, ranks = layer["scores"] or {}, layer["ranks"]
        table.add_row(
            layer["name"], percent(score.get("sparsity")), number(score.get("silhouette"), 3),
            number(score.get("sensitivity")), number(score.get("score"), 2),
            f"{ranks[0]}+{ranks[1]}" if ranks else "dense", f"{ranks[2]}+{ranks[3]}" if ranks else "dense",
            percent(layer["router_accuracy"]),
        )  # fmt: skip
    return table
