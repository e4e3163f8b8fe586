"""The commands that make an artifact again, rebuilt from the recipe that it records."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pydantic_core import PydanticUndefined

from exporter.markup.values import DASH, dig, word
from exporter.report.sources import Sources
from exporter.terminal.options import flag_of
from moee.config import FinetuneConfig, Options
from moee.errors import UserError
from moee.methods.base import Method
from moee.methods.recipe import make_recipe, read_recipe_json
from moee.methods.registry import DEFAULT, METHODS, options_for
from moee.natural_order import in_order
from moee.shrinking.options import ShrinkConfig

CHANGES: dict[str, tuple[type[Options], str]] = {"finetune": (FinetuneConfig, "tuned"), "shrink": (ShrinkConfig, "shrunk")}
# models that bring their weights and arguments (exporter/pretrained.py)
ALIASES = ("dinov2-s", "vit-scratch", "swin-scratch", "convnext-scratch")


def commands(sources: Sources) -> list[str]:
    """Shell lines in the order of the pipeline, for what was found. Flags that hold their default are left out."""
    lines, source = [], "extracted"
    model = sources.body("moee.model")
    own = _function_words(model)
    if model and isinstance(model.get("model"), dict):
        lines += _extract(model)
        source = "extracted"
        for command, data, config in _changes(model):
            other = ["--data", data] if data and data != _extracted_on(model) else []
            kind, done = CHANGES[command]
            number = 1 + sum(line.startswith(f"moee {command} ") for line in lines)
            out = done if number == 1 else f"{done}{number}"
            lines.append(_line("moee", command, source, *own, *other, *_flags(config, kind), "--out", out))
            source = out
    export = sources.body("moee.export")
    if export:
        precision = export.get("precision")
        typed = ["--precision", precision] if isinstance(precision, str) and precision != "fp32" else []
        if isinstance(images := dig(export, "quantization", "moee", "images"), int):
            typed += ["--calibration-images", str(images)]
            typed += _other(dig(export, "quantization", "moee", "data"), export)
        lines.append(_line("moee", "export", source, *own, *typed, "--out", "export"))
    if sources.body("moee.parity"):
        other = _other(dig(sources.body("moee.parity"), "data"), export or model)
        lines.append(_line("moee", "verify", "export", *other, "--out", "verify"))
    latency = sources.body("moee.latency")
    if latency:
        words = [
            w for key in ("batch", "runs", "threads") if isinstance(latency.get(key), int) for w in (f"--{key}", latency[key])
        ]
        other = [] if latency.get("images") in ("noise", "given") else _other(latency.get("images"), export or model)
        lines.append(_line("moee", "bench", "export", *other, *words, "--out", "latency.json"))
    engine = sources.body("moee.engine")
    if engine:
        lines.append(_build(engine))
    if sources.body("moee.summary"):
        lines.append("moee demo --out demo   # all of the above")
    return lines


def _other(data: Any, body: Any) -> list[str]:
    """The flag that names the images, where they are others than those of an artifact's `body`."""
    return ["--data", data] if isinstance(data, str) and data not in ("", dig(body, "data")) else []


def _line(*words: Any) -> str:
    return shlex.join(str(word) for word in words)


def _extracted_on(body: dict[str, Any]) -> str:
    """The data of the extraction; the artifact's own are those of the last stage."""
    data = dig(body, "info", "stages", "extracted", "data") or body.get("data")
    return data if isinstance(data, str) and data else "DATA"


def _function_words(body: dict[str, Any] | None) -> list[str]:
    """The flag with which later commands may import the function that a model comes from."""
    spec = body.get("model") if body else None
    named = spec.get("name") if isinstance(spec, dict) and spec.get("library") == "python" else None
    return ["--model", str(named)] if named else []


def _done(body: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """The record of every tuning or shrinking, the first one first."""
    last = dig(body, "info", "stages", stage)
    if not isinstance(last, dict):
        return []
    every = [*(last["before"] if isinstance(last.get("before"), list) else []), {"data": body.get("data"), **last}]
    return [done for done in every if isinstance(done, dict)]


def _changes(body: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """What was done to the extracted model, in turn: the command, its data and its options."""
    tunings = _done(body, "tuned")
    steps = [("finetune", stage) for stage in tunings]
    for number, stage in enumerate(_done(body, "shrunk")):
        came = stage.get("tunings")  # so many tunings were first, and `number` shrinkings
        at = came if isinstance(came, int) and 0 <= came <= len(tunings) else len(tunings)
        steps.insert(number + at, ("shrink", stage))
    return [
        (command, data if isinstance(data := stage.get("data"), str) else "", stage["config"])
        for command, stage in steps if isinstance(stage.get("config"), dict)
    ]  # fmt: skip


def _extract(body: dict[str, Any]) -> list[str]:
    """The extraction, behind what writes the files that it needs."""
    spec = body["model"]
    alias = spec.get("name") in ALIASES
    words = ["moee", "extract", _name(spec), "--data", _extracted_on(body)]
    if spec.get("pretrained"):
        words += [] if spec.get("library") == "python" else ["--pretrained"]  # a function brings its weights
    elif spec.get("weights") and not alias and not _brought(spec):
        words += ["--checkpoint", str(spec["weights"])]
    elif isinstance(spec.get("random_seed"), int):
        words += ["--random-weights", spec["random_seed"]]
    words += _image_size(spec) if spec.get("name") == ALIASES[0] else [] if alias else _model_arguments(spec)
    lines, names = [], body.get("classes")
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names) and tuple(names) != in_order(names):
        lines.append(_file("classes.txt", "\n".join(names) + "\n"))
        words += ["--class-map", "classes.txt"]
    recipe = body.get("recipe")
    text = _recipe_text(recipe)
    if text:
        lines.append(_file("recipe.toml", text))
    how = ["--recipe", "recipe.toml"] if text else _recipe_words(recipe)
    return [*lines, _line(*words, *how, "--out", "extracted")]


def _file(name: str, text: str) -> str:
    return f"printf %s {shlex.quote(text)} > {name}"


def _recipe_text(recipe: Any) -> str:
    """The recipe as a file where flags cannot say it, since its steps have different values of one option; else nothing."""
    found = recipe.get("steps") if isinstance(recipe, dict) else None
    steps = [step for step in found if isinstance(step, dict)] if isinstance(found, list) else []
    shared = {name for step in steps for name in step if name != "method"}
    if all(len({repr(step[name]) for step in steps if name in step}) < 2 for name in shared):
        return ""
    try:
        return replace(read_recipe_json(recipe, "moee.json"), tune=None).to_toml()
    except UserError:
        return ""


def _recipe_words(recipe: Any) -> list[Any]:
    """The flags of a recipe's steps."""
    found = recipe.get("steps") if isinstance(recipe, dict) else None
    steps = [step for step in found if isinstance(step, dict)] if isinstance(found, list) else []
    words: list[Any] = []
    for step in steps:
        method = next((method for method in METHODS if method.name == step.get("method")), None)
        if method is not None:
            words += _step_words(method, step, words, step is steps[-1])
    return words


def _step_words(method: Method[Any], step: dict[str, Any], said: Sequence[Any], last: bool) -> list[Any]:
    """The flags of a step, but for those that were `said`: from the preset that takes the fewest. `last`: it is the recipe's
    method."""
    values = {name: value for name, value in step.items() if name != "method"}
    named = ["--method", method.name] if last and method is not DEFAULT else []
    try:
        idle = options_for(method, _tuples(values)).idle()  # a command that names these is refused
    except UserError:
        idle = {}
    ways = []
    for number, (preset, start) in enumerate(method.presets.items()):
        usual = {name: start.get(name, field.default) for name, field in method.options.model_fields.items()}
        given = {name: values[name] for name in usual if values.get(name) not in (None, usual[name])}
        try:
            made = make_recipe(method.name, preset, _tuples(given)).cut
            if made == options_for(method, _tuples(values)):
                told = {name: value for name, value in given.items() if name not in idle}
                ways.append([*named, *(["--preset", preset] if number else []), *_words(told, said)])
        except UserError:  # of a manifest that somebody changed, or of another version
            continue
    return min(ways, key=len, default=[*named, *_flags({n: v for n, v in values.items() if n not in idle}, method.options, said)])


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _name(spec: dict[str, Any]) -> str:
    """The model's name; that of a local folder by the path of the weights in it, which is absolute."""
    name = str(spec.get("name", "MODEL"))
    return f"{name.partition(':')[0]}:{os.path.dirname(str(spec['weights']))}" if _in_folder(spec) else name


def _in_folder(spec: dict[str, Any]) -> bool:
    """Whether the model is a local folder, and its weights are those in it."""
    source, _, where = str(spec.get("name")).partition(":")
    folder, inside = os.path.dirname(str(spec.get("weights"))), os.path.normpath(where)
    return source in ("local-dir", "hf") and (folder == inside or folder.endswith(os.sep + inside.lstrip("./")))


def _brought(spec: dict[str, Any]) -> bool:
    """Whether the weights are those that a name of a local folder or of the hub brings."""
    if _in_folder(spec):
        return True
    source, _, where = str(spec.get("name")).partition(":")
    folder = os.path.dirname(str(spec["weights"]))
    return source == "hf-hub" and f"models--{where.partition('@')[0].replace('/', '--')}" in folder.split("/")


def _model_arguments(spec: dict[str, Any]) -> list[Any]:
    """timm's own flags for a model's arguments."""
    given = spec["kwargs"] if isinstance(spec.get("kwargs"), dict) else {}
    own = [name for name in ("num_classes", "in_chans") if isinstance(given.get(name), int)]
    words: list[Any] = [word for name in own for word in (f"--{name.replace('_', '-')}", given[name])]
    words += _image_size(spec)
    if isinstance(spec.get("outputs"), int):  # of a function that takes no number of classes
        words += ["--num-classes", spec["outputs"]]
    told = ("img_size", "image_size") if spec.get("input_size") else ("img_size",)
    rest = [f"{name}={value}" for name, value in given.items() if name not in (*own, *told)]
    return words + (["--model-kwargs", *rest] if rest else [])


def _image_size(spec: dict[str, Any]) -> list[Any]:
    given = spec["kwargs"] if isinstance(spec.get("kwargs"), dict) else {}
    size = spec.get("input_size") or given.get("img_size")
    return ["--img-size", *(size if isinstance(size, (list, tuple)) else [size])] if size else []


def _flags(values: dict[str, Any], kind: type[Options], said: Sequence[Any] = ()) -> list[Any]:
    """Flags of the settings that differ from their default, but for those that were `said`."""
    return _words(dict(_changed(values, kind)), said)


def _words(values: dict[str, Any], said: Sequence[Any]) -> list[Any]:
    """Flags with their values, but for those that were `said`."""
    words: list[Any] = []
    for name, value in values.items():
        flag = flag_of(name)
        if flag in said:
            continue
        if isinstance(value, bool):
            words += [flag if value else f"--no-{flag.removeprefix('--')}"]
        elif isinstance(value, (list, tuple)):
            words += [w for item in value for w in (flag, item)]
        else:
            words += [flag, value]
    return words


def _changed(values: dict[str, Any], kind: type[Options]) -> Iterator[tuple[str, Any]]:
    for name, info in kind.model_fields.items():
        value = values.get(name, info.default)
        if value is not None and value != info.default and value is not PydanticUndefined:
            yield name, value


def _build(engine: dict[str, Any]) -> str:
    batch = engine.get("batch") if isinstance(engine.get("batch"), dict) else {}
    shapes = [w for key in ("min", "opt", "max") if dig(batch, key) for w in (f"--{key}-shapes", dig(batch, key))]
    return _line(
        "moee",
        "build",
        "export",
        "--backend",
        (word(engine.get("builder")).split() or [DASH])[0].replace(DASH, "tensorrt-rtx"),
        *shapes,
        "--out",
        "engine",
    )
