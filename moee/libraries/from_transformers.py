"""Vision models of transformers in local folders: `hf:PATH` with config.json, weights and preprocessor_config.json.

Nothing is fetched and no code of a folder is run: the classes are those of the installed transformers, out of the table below,
and of a configuration only what that class's own fields name is taken. transformers brings old names of tensors up to date.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moee.errors import UserError
from moee.interface.adapted import AdaptedModel
from moee.interface.spec import InputConfig, ModelSpec
from moee.libraries.adapt import adapt
from moee.libraries.library import Library, Named
from moee.libraries.positions import resized_positions
from moee.libraries.transformers_classes import ARCHITECTURES, TOWERS, TYPES, Architecture, class_named, own_fields
from moee.libraries.transformers_input import SIZE, read_input, read_object
from moee.schema import shown

PREFIX = "hf:"
CONFIG = "config.json"
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
LEFT = ("position_ids", "relative_position_index", "mask_token", "pooler.")  # of files, where the model has none
TEXT = ("text_model.", "text_projection.", "logit_scale", "logit_bias")


def named(name: str, arguments: dict[str, Any]) -> Named:
    """The model in the folder behind `hf:PATH`. `arguments` go over its configuration; `num_classes` is the number of labels.

    Raises `UserError` for a folder that is none of a vision model, `MissingDependency` without transformers.
    """
    folder = Path(name.removeprefix(PREFIX))
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG} not found; hf: expects a local folder as transformers saves it")
    body = read_object(folder / CONFIG)
    architecture, notes = _architecture(body, folder)
    row = ARCHITECTURES[architecture]
    config = _fields(row, body.get("vision_config", body) if row.tower or row.whole else body)
    if row.tower and isinstance(body.get("projection_dim"), int) and "projection_dim" in own_fields(row.config):
        config["projection_dim"] = body["projection_dim"]
    labels = _labels(body) if "Classification" in architecture else ()
    if "Classification" in architecture:
        config["num_labels"] = len(labels) or (body["num_labels"] if isinstance(body.get("num_labels"), int) else 2)
    given, said = read_input(folder, row, config)
    if any(label.startswith("LABEL_") for label in labels) or arguments.get("num_classes", len(labels)) != len(labels):
        labels = ()
    spec = ModelSpec(
        name=name, timm_name=architecture, library="hf", kwargs=arguments, config=config, input=given, labels=labels
    )
    _check(spec)
    weights = next((folder / file for file in FILES if (folder / file).is_file()), None)
    return Named(spec, weights, (*notes, *said))


def _architecture(body: dict[str, Any], folder: Path) -> tuple[str, list[str]]:
    """The class that a configuration asks for, and what is to be said of it."""
    given = body.get("architectures")
    name = given[0] if isinstance(given, list) and given else TYPES.get(str(body.get("model_type")), "")
    if isinstance(name, str) and name in TOWERS:
        return TOWERS[name], [f"{folder} holds a {name}: its vision tower is taken, as {TOWERS[name]}"]
    if not isinstance(name, str) or name not in ARCHITECTURES:
        what = shown(name or body.get("model_type"))
        raise UserError(
            f"{folder / CONFIG} asks for {what}; known are {', '.join([*ARCHITECTURES, *TOWERS])}; a model of another class can "
            "be given as package.module:function"
        )
    return name, []


def _fields(row: Architecture, body: Any) -> dict[str, Any]:
    """What a configuration says of the fields that its class has of its own: no code, no files, no implementation to choose."""
    fields = own_fields(row.config)
    given = body if isinstance(body, dict) else {}
    return {name: value for name, value in given.items() if name in fields}


def _labels(body: dict[str, Any]) -> tuple[str, ...]:
    """The class names of `id2label` by their number; none where they are no names of 0, 1, 2, ..."""
    given = body.get("id2label")
    if not isinstance(given, dict) or not all(isinstance(k, str) and k.isdecimal() for k in given):
        return ()
    pairs = sorted((int(number), label) for number, label in given.items())
    if [number for number, _ in pairs] != list(range(len(pairs))):
        return ()
    names = tuple(str(label) for _, label in pairs)
    fine = len(set(names)) == len(names) and all(name.isprintable() and 0 < len(name) <= 255 for name in names)
    return names if fine else tuple(f"LABEL_{number}" for number, _ in pairs)


def _check(spec: ModelSpec) -> None:
    if spec.timm_name not in ARCHITECTURES:
        raise UserError(f"{shown(spec.timm_name)} is no vision model of transformers that is known here")
    row = ARCHITECTURES[spec.timm_name]
    fields = own_fields(row.config)
    for name in (spec.config or {}).keys() | spec.kwargs.keys():
        if name not in fields | {"num_labels", "num_classes", "in_chans"}:
            raise UserError(f"{spec.called} has no argument {shown(name)}; {row.config} of transformers lists them")


def _create(spec: ModelSpec) -> nn.Module:
    row = ARCHITECTURES[spec.timm_name]
    values = {**(spec.config or {}), **spec.kwargs}
    labels = values.pop("num_labels", 2)
    labels = values.pop("num_classes", labels)
    if "in_chans" in values:
        values["num_channels"] = values.pop("in_chans")
    with _quiet():
        config = class_named(row.config)(**values)
        if _classifies(spec):
            config.num_labels = labels
        top = config
        if row.whole:
            top = class_named(row.whole)(vision_config=config.to_dict())
            top.num_labels = labels
        for each in (top, getattr(top, "vision_config", top)):
            each._attn_implementation = "eager"  # every model has it, it exports with masks too, and its products are counted
        net = class_named(spec.timm_name)(top)
    given = (spec.input or InputConfig()).model_copy(update=_size_of(spec, values))
    told = None if _classifies(spec) else 0
    head = ("classifier",) if told is None and labels == 0 else ()
    model = adapt(net, given, 0 if head else told, spec.called, head)
    if isinstance(model, AdaptedModel):
        model.filters = (_filter,)
    return model


def _size_of(spec: ModelSpec, values: dict[str, Any]) -> dict[str, Any]:
    size: Any = spec.input_size or spec.kwargs.get(SIZE)
    before = spec.input.input_size if spec.input else None
    channels = values.get("num_channels", before[0] if before else 3)
    if size is None:
        return {"input_size": (channels, *before[1:])} if before else {}
    return {"input_size": (channels, *((size, size) if isinstance(size, int) else size))}


def _filter(state: Mapping[str, Tensor], net: Any) -> dict[str, Tensor]:
    """The tensors of a file in the names of the installed transformers, by its own conversion."""
    row = ARCHITECTURES[type(net).__name__]
    expected = net.state_dict()
    left = [part for part in LEFT if not any(part in name for name in expected)]
    text = TEXT if row.tower else ()
    kept = {name: t for name, t in state.items() if not name.startswith(text) and not any(part in name for part in left)}
    with _quiet(), torch.device("cpu"):
        made, loading = type(net).from_pretrained(
            None, config=net.config, state_dict=dict(kept), output_loading_info=True, ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )  # fmt: skip
    missing, mismatched = set(loading["missing_keys"]), {item[0]: item[1] for item in loading["mismatched_keys"]}
    result = {name: tensor for name, tensor in made.state_dict().items() if name not in missing | mismatched.keys()}
    for name, shape in mismatched.items():
        result[name] = kept.get(name, torch.empty(shape, device="meta"))
    result |= {name: kept[name] for name in loading["unexpected_keys"] if name in kept}
    prefix = sum(name.endswith(("cls_token", "class_embedding", "distillation_token")) for name in expected)
    return resized_positions(result, net, prefix)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers logs and shows bars of its own; errors still raise."""
    logging = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _classifies(spec: ModelSpec) -> bool:
    return "Classification" in spec.timm_name


def _pretrained(spec: ModelSpec) -> nn.Module:
    raise UserError(f"{spec.called}: the weights of a folder are its files', none are fetched; give one with --checkpoint")


HF = Library(_check, _create, _pretrained, lambda spec: SIZE, _classifies, lambda spec: None, lambda spec: "")
