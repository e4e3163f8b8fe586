"""What a checkpoint's `args`, written by timm's train.py, say of its model: how images were prepared, and under which arguments.

Followed as timm's `resolve_data_config` follows the same flags in the validation of train.py: `input_size` before `img_size`, and
what is None, or empty, says nothing. The values are a stranger's: one that is out of bounds is said and not taken.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import timm
import torch
from pydantic import ValidationError
from timm.models import split_model_name_tag
from torch import Tensor

from moee.config import MAX_SIDE
from moee.errors import UserError
from moee.interface.spec import InputConfig
from moee.models.input_size import sized
from moee.models.model import ModelSpec, build_model
from moee.schema import shown

PREPARATION = ("crop_pct", "mean", "std", "interpolation", "crop_mode")
PER_CHANNEL = ("mean", "std")


def training_args(content: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the training script in a checkpoint; none where it holds none."""
    given = content.get("args")
    if isinstance(given, argparse.Namespace):
        given = vars(given)
    found = given.items() if isinstance(given, Mapping) else ()
    return {name: value for name, value in found if not isinstance(value, Tensor)}  # no argument of a command line is one


def as_trained(spec: ModelSpec, content: Mapping[str, Any], file: str) -> tuple[ModelSpec, list[str]]:
    """`spec` with images prepared as the checkpoint `file` says that it was trained, and sentences about what was taken and what
    was not. A size that the user gave stays.

    Raises `UserError` for a size that the model cannot take.
    """
    args = training_args(content)
    taken, refused = _preparation(args, _channels(spec, args))
    notes = [*_differences(spec, {**args, "model": _said_model(content, args)}, file), *_accuracy(content, args, file)]
    if spec.library != "timm":
        names = ", ".join([*taken, *refused])
        return spec, [f"{file}: its args name {names}, which are taken for timm's models alone", *notes] if names else notes
    words = []
    size = _size(args, refused)
    if size is not None and "img_size" not in spec.kwargs and spec.input_size is None and size != _own_size(spec):
        try:
            spec = sized(spec, size)
        except UserError as error:
            raise UserError(f"{file} says that it was trained on {size[0]} x {size[1]} pixels: {error}") from error
        words.append(f"{size[0]} x {size[1]} pixels")
    if taken:
        before = spec.input or InputConfig()
        spec = spec.model_copy(update={"input": before.model_copy(update=taken)})
        words += [f"{name} {shown(_plain(value), quoted=False)}" for name, value in taken.items()]
    if words:
        notes.insert(0, f"{file}: trained with {', '.join(words)}, taken")
    notes += [f"{file}: its {name}, {shown(value)}, is none that images can be prepared with; not taken"
              for name, value in refused.items()]  # fmt: skip
    return spec, notes


def _accuracy(content: Mapping[str, Any], args: Mapping[str, Any], file: str) -> list[str]:
    """A sentence about the accuracy that train.py measured, which shows an order of the classes that is not the training's."""
    metric = content.get("metric")
    if not args or args.get("eval_metric") not in (None, "top1") or not isinstance(metric, float) or not 0 < metric <= 100:
        return []
    return [f"{file}: its training measured an accuracy of {metric:.2f}%; if the dense model has far less here, the classes may "
            "be numbered otherwise (--class-map)"]  # fmt: skip


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _channels(spec: ModelSpec, args: Mapping[str, Any]) -> int:
    """Input channels, in timm's order; a model's that the user says come first."""
    size, asked = args.get("input_size"), spec.kwargs.get("in_chans")
    theirs = size[0] if isinstance(size, (tuple, list)) and len(size) == 3 else args.get("in_chans")
    channels = next((count for count in (asked, theirs, args.get("chans")) if isinstance(count, int)), 3)
    return channels if 0 < channels <= MAX_SIDE else 3


def _preparation(args: Mapping[str, Any], channels: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """How images were prepared, and the values that cannot be."""
    taken: dict[str, Any] = {}
    refused: dict[str, Any] = {}
    for name in PREPARATION:
        value = args.get(name)
        if value is None or (name not in PER_CHANNEL and not value):
            continue
        try:
            fine = getattr(InputConfig.model_validate({name: value}), name)
        except ValidationError:
            refused[name] = value
            continue
        if name in PER_CHANNEL and len(fine) == 1:
            fine = fine * channels
        if fine == "random" or (name in PER_CHANNEL and len(fine) != channels):  # `random` is for training
            refused[name] = value
        else:
            taken[name] = fine
    return taken, refused


def _size(args: Mapping[str, Any], refused: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width of the images; DeiT's and MAE's scripts call one number `input_size`. What is none goes to `refused`."""
    arguments = args.get("model_kwargs")
    given = {"input_size": args.get("input_size"), "img_size": args.get("img_size")}
    if isinstance(arguments, Mapping):
        given["model_kwargs.img_size"] = arguments.get("img_size")
    for name, value in given.items():
        if value is None:
            continue
        sides = list(value)[-2:] if isinstance(value, (tuple, list)) else [value, value]
        if len(sides) == 2 and all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
            return sides[0], sides[1]
        refused[name] = value
    return None


def _own_size(spec: ModelSpec) -> tuple[int, int]:
    with torch.device("meta"):
        described: Any = build_model(spec).pretrained_cfg
    height, width = described["input_size"][1:]
    return height, width


def _differences(spec: ModelSpec, args: Mapping[str, Any], file: str) -> list[str]:
    """Sentences about what the training says otherwise, or knows, of the model."""
    notes = []
    model = args.get("model")
    if isinstance(model, str) and spec.library == "timm":
        said = f"{file} says that it is {shown(model, quoted=False)}; it is taken as {spec.timm_name}"
        if _bare_name(model) != _bare_name(spec.timm_name):
            notes.append(said)
        elif _prepared(model) not in (None, _prepared(spec.timm_name)):
            notes.append(f"{said}, for which images are prepared otherwise: give that name")
    arguments = args.get("model_kwargs")
    other = {name: value for name, value in (arguments.items() if isinstance(arguments, Mapping) else ())
             if isinstance(name, str) and name != "img_size" and _plain(spec.kwargs.get(name)) != _plain(value)}  # fmt: skip
    if args.get("gp") and spec.kwargs.get("global_pool") != args["gp"]:
        other.setdefault("global_pool", args["gp"])
    if other:
        told = " ".join(f"{shown(name, quoted=False)}={shown(_plain(value), quoted=False)}" for name, value in other.items())
        notes.append(f"{file} was trained with --model-kwargs {told}, which are not given")
    classes = args.get("class_map")
    if isinstance(classes, str) and classes:
        notes.append(f"{file}: its classes were numbered by {shown(classes, quoted=False)}; --class-map takes that file")
    return notes


def _said_model(content: Mapping[str, Any], args: Mapping[str, Any]) -> Any:
    """The model that was trained: by its argument, else by the name beside the weights, where timm knows that."""
    arch = content.get("arch")
    return args.get("model") or (arch if isinstance(arch, str) and timm.is_model(_bare_name(arch)) else None)


def _prepared(model: str) -> tuple[Any, ...] | None:
    """How images are prepared for a name of timm's with its tag, where nothing else says it; None for a tag that timm lacks."""
    try:
        described = timm.get_pretrained_cfg(_plain_name(model))
    except RuntimeError:
        return None
    return None if described is None else tuple(getattr(described, name) for name in (*PREPARATION, "input_size"))


def _plain_name(model: str) -> str:
    return model.rpartition("/")[2].rpartition(":")[2]


def _bare_name(model: str) -> str:
    return split_model_name_tag(_plain_name(model))[0]
