"""Classification models of torchvision: `torchvision:vit_b_16`.

What their images look like is said by the transforms of torchvision's own weights. Files are read by our reader alone:
torchvision would unpickle what lies in its cache.
"""

from __future__ import annotations

import difflib
import math
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model_builder, get_model_weights, list_models

from moee.errors import MissingDependency, UserError
from moee.interface.adapted import AdaptedModel, on_meta
from moee.interface.spec import InputConfig, ModelSpec
from moee.libraries.adapt import adapt, without_head
from moee.libraries.library import Library, Named
from moee.libraries.positions import resized_positions
from moee.schema import reason_of, shown
from moee.store.artifact import sha256_file
from moee.store.scratch import temporary_folder
from moee.weights.hub import host_reachable
from moee.weights.loading import load_weights

PREFIX = "torchvision:"
FETCHING = {"weights", "weights_backbone", "pretrained", "pretrained_backbone", "progress"}  # arguments that open files
SIZE = "image_size"
OLD_NAMES = {"linear_1": "0", "linear_2": "3"}  # of an MLP's maps in torchvision's files of ViTs


def named(name: str, arguments: dict[str, Any]) -> Named:
    """The model behind `torchvision:NAME`. Raises `UserError` for an unknown one."""
    spec = ModelSpec(name=name, timm_name=name.removeprefix(PREFIX), library="torchvision", kwargs=arguments)
    _check(spec)
    return Named(spec.model_copy(update={"input": _input(spec.timm_name)}))


def _known() -> list[str]:
    """The classification models: detection and segmentation have modules of their own."""
    return list_models(module=torchvision.models)


def _check(spec: ModelSpec) -> None:
    known = _known()
    if spec.timm_name not in known:
        close = difflib.get_close_matches(spec.timm_name, known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "`torchvision.models.list_models()` lists the names"
        raise UserError(f"torchvision has no classification model {shown(spec.timm_name)}; {hint}")
    forbidden = sorted(spec.kwargs.keys() & FETCHING)
    if forbidden:
        raise UserError(f"{spec.called} with the argument {forbidden[0]}: it would open files; give --pretrained or --checkpoint")
    size = spec.kwargs.get(SIZE)
    if size is not None and not isinstance(size, int):
        raise UserError(f"{spec.called} takes square images, came {shown(size)}; give one number")


def _input(name: str) -> InputConfig:
    """How images are prepared for torchvision's own weights of a model, as timm describes it."""
    given = get_model_weights(name).DEFAULT.transforms()
    crop, resize = int(given.crop_size[0]), int(given.resize_size[0])
    return InputConfig(
        input_size=(3, crop, crop), mean=tuple(given.mean), std=tuple(given.std), crop_pct=crop_share(crop, resize),
        crop_mode="center", interpolation=given.interpolation.value,
    )  # fmt: skip


def crop_share(crop: int, resize: int) -> float:
    """The share by which timm finds `resize` again: it divides `crop` by it and rounds down. At most 1."""
    share = min(1.0, crop / resize)
    return share if math.floor(crop / share) == resize else crop / (resize + 0.5)


def _create(spec: ModelSpec) -> nn.Module:
    kwargs = {name: value for name, value in spec.kwargs.items() if not (name == "num_classes" and value == 0)}
    builder = get_model_builder(spec.timm_name)
    try:
        net = builder(**kwargs)
    except NotImplementedError:  # RegNet computes its widths with tensors
        with torch.device("cpu"):
            net = builder(**kwargs)
        net = on_meta(net) if torch.empty(0).device.type == "meta" else net
    given = spec.input or _input(spec.timm_name)
    size = spec.input_size or (spec.kwargs.get(SIZE),) * 2
    if size[0] is not None:
        given = given.model_copy(update={"input_size": (3, *size)})
    model = adapt(net, given, title=spec.called)
    if spec.kwargs.get("num_classes") == 0 and isinstance(model, AdaptedModel):
        head = model.description.classifier
        without_head(net, head)
        model = adapt(net, given, 0, spec.called, head)
    if isinstance(model, AdaptedModel):
        model.filters = (_filter,)
    return model


def _filter(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """torchvision's files in the names of today, position embeddings in the model's size."""
    renamed = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(.*\.mlp)\.(linear_[12])\.(weight|bias)", name)
        renamed[f"{found[1]}.{OLD_NAMES[found[2]]}.{found[3]}" if found else name] = tensor
    return resized_positions(renamed, model, 1)


def _size_argument(spec: ModelSpec) -> str | None:
    return SIZE if spec.timm_name.startswith("vit_") else None


def _pretrained(spec: ModelSpec) -> nn.Module:
    """The model with torchvision's default weights, from its hub cache or fetched into it.

    Raises `MissingDependency` if they are not there and cannot be fetched, `UserError` if they do not fit the arguments.
    """
    path = _fetched(spec)
    model = _create(spec)
    load_weights(model, path)
    return model


def _fetched(spec: ModelSpec) -> Path:
    """The file of the default weights in torchvision's cache."""
    weights = get_model_weights(spec.timm_name).DEFAULT
    address = str(weights.url)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(address).path).name
    if path.is_file():
        return path
    missing = (
        f"pretrained weights of {spec.called} could not be fetched and are not in the cache; where there is a network run "
        f"`curl -LO {address}`, then give the file with --checkpoint"
    )
    if not host_reachable(address):
        raise MissingDependency(missing)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path.parent) as folder:
            urllib.request.urlretrieve(address, folder / path.name)
            wanted = re.search(r"-([0-9a-f]{8,})\.", path.name)
            if wanted and not sha256_file(folder / path.name).startswith(wanted[1]):
                raise UserError(f"{address} is not the file that torchvision names: its hash differs; fetch it again")
            (folder / path.name).rename(path)
    except OSError as error:
        raise MissingDependency(f"{missing} ({reason_of(error)})") from error
    return path


def _pretrained_classes(spec: ModelSpec) -> int:
    return len(get_model_weights(spec.timm_name).DEFAULT.meta["categories"])


def _drifted(spec: ModelSpec) -> str:
    return (
        f"torchvision's pretrained weights of {spec.timm_name} are not those that the artifact was made from; install the "
        "torchvision version of then, or extract again"
    )


TORCHVISION = Library(_check, _create, _pretrained, _size_argument, lambda spec: True, _pretrained_classes, _drifted)
