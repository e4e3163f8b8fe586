"""Vision models of transformers in local folders: `hf:PATH` with config.json, weights and preprocessor_config.json.

Nothing is fetched and no code of a folder is run: the classes are those of the installed transformers, out of the table below,
and of a configuration only what that class's own fields name is taken. transformers brings old names of tensors up to date.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn

from moee.errors import MissingDependency, UserError
from moee.interface.adapted import AdaptedModel
from moee.interface.spec import InputConfig, ModelSpec
from moee.libraries.adapt import adapt
from moee.libraries.library import Library, Named
from moee.libraries.positions import resized_positions
from moee.schema import parse_json, reason_of, shown

PREFIX = "hf:"
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # by Pillow's numbers
HALF = ((0.5,) * 3, (0.5,) * 3)
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
CLIP = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
LEFT = ("position_ids", "relative_position_index", "mask_token", "pooler.")  # of files, where the model has none
TEXT = ("text_model.", "text_projection.", "logit_scale", "logit_bias")
Scale = tuple[tuple[float, ...], tuple[float, ...]]
SIZE = "image_size"
ELSE = "give the model as package.module:function"


@dataclass(frozen=True)
class Architecture:
    """A class of transformers. `config`: the class of its configuration. `whole`: the class that holds this as `vision_config`,
    where the model is made from that. `tower`: it is taken for a model of images and texts, whose images it reads. `scale`: mean
    and deviation that its image processor has unless told otherwise."""

    config: str
    scale: Scale
    whole: str = ""
    tower: bool = False


def _family(prefix: str, scale: Scale) -> dict[str, Architecture]:
    """The two models of most families: with a classifier, and without."""
    return {f"{prefix}{kind}": Architecture(f"{prefix}Config", scale) for kind in ("ForImageClassification", "Model")}


ARCHITECTURES: Mapping[str, Architecture] = {
    **_family("ViT", HALF), **_family("DeiT", IMAGENET),
    "DeiTForImageClassificationWithTeacher": Architecture("DeiTConfig", IMAGENET),
    **_family("ViTMSN", IMAGENET), **_family("Dinov2", IMAGENET), **_family("Dinov2WithRegisters", IMAGENET),
    **_family("DINOv3ViT", IMAGENET), **_family("Beit", HALF), **_family("Swin", IMAGENET), **_family("Swinv2", IMAGENET),
    **_family("ConvNext", IMAGENET), **_family("ConvNextV2", IMAGENET), **_family("Hiera", IMAGENET),
    "CLIPVisionModel": Architecture("CLIPVisionConfig", CLIP),
    "CLIPVisionModelWithProjection": Architecture("CLIPVisionConfig", CLIP, tower=True),
    "CLIPForImageClassification": Architecture("CLIPVisionConfig", CLIP, "CLIPConfig"),
    "SiglipVisionModel": Architecture("SiglipVisionConfig", HALF, tower=True),
    "SiglipForImageClassification": Architecture("SiglipVisionConfig", HALF, "SiglipConfig"),
}  # fmt: skip
TOWERS = {"CLIPModel": "CLIPVisionModelWithProjection", "SiglipModel": "SiglipVisionModel"}
TYPES = {  # what a configuration without `architectures` is for
    "vit": "ViTModel", "deit": "DeiTModel", "dinov2": "Dinov2Model", "beit": "BeitModel", "swin": "SwinModel",
    "clip": "CLIPVisionModelWithProjection", "clip_vision_model": "CLIPVisionModel", "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}  # fmt: skip


def named(name: str, arguments: dict[str, Any]) -> Named:
    """The model in the folder behind `hf:PATH`. `arguments` go over its configuration; `num_classes` is the number of labels.

    Raises `UserError` for a folder that is none of a vision model, `MissingDependency` without transformers.
    """
    folder = Path(name.removeprefix(PREFIX))
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG} not found; hf: expects a local folder as transformers saves it")
    body = _json(folder / CONFIG)
    architecture, notes = _architecture(body, folder)
    row = ARCHITECTURES[architecture]
    config = _fields(row, body.get("vision_config", body) if row.tower or row.whole else body)
    if row.tower and isinstance(body.get("projection_dim"), int) and "projection_dim" in _own_fields(row.config):
        config["projection_dim"] = body["projection_dim"]
    labels = _labels(body) if "Classification" in architecture else ()
    if "Classification" in architecture:
        config["num_labels"] = len(labels) or (body["num_labels"] if isinstance(body.get("num_labels"), int) else 2)
    given, said = _input(folder, row, config)
    if any(label.startswith("LABEL_") for label in labels) or arguments.get("num_classes", len(labels)) != len(labels):
        labels = ()
    spec = ModelSpec(
        name=name, timm_name=architecture, library="hf", kwargs=arguments, config=config, input=given, labels=labels
    )
    _check(spec)
    weights = next((folder / file for file in FILES if (folder / file).is_file()), None)
    return Named(spec, weights, (*notes, *said))


def _json(path: Path) -> dict[str, Any]:
    try:
        body = parse_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({reason_of(error)}); save the model with transformers again") from error
    if not isinstance(body, dict):
        raise UserError(f"{path} holds no JSON object; save the model with transformers again")
    return body


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
    own = _own_fields(row.config)
    given = body if isinstance(body, dict) else {}
    return {name: value for name, value in given.items() if name in own}


def _own_fields(config: str) -> set[str]:
    """Fields that a configuration class adds to the common ones, but for those that choose among implementations."""
    kind = _class(config)
    fields = set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}
    for base in kind.__mro__:
        if not base.__module__.endswith("configuration_utils"):
            fields |= set(vars(base).get("__annotations__", {}))
    base = next(base for base in kind.__mro__ if base.__module__.endswith("configuration_utils"))
    common = set(inspect.signature(base.__init__).parameters) | set(vars(base).get("__annotations__", {}))
    return {name for name in fields - common if not name.startswith("_")}


def _class(name: str) -> Any:
    """A class of transformers. Raises `MissingDependency` without it, `UserError` if it is too old to have the class."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependency("hf: models need transformers: pip install 'moee[hf]'") from error
    try:
        return getattr(transformers, name)
    except AttributeError as error:
        version = transformers.__version__
        raise UserError(f"transformers {version} has no {name}; install a newer one: pip install -U 'moee[hf]'") from error


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


def _input(folder: Path, row: Architecture, config: dict[str, Any]) -> tuple[InputConfig, list[str]]:
    """How images are prepared, and what the folder does not say of it."""
    path = folder / PROCESSOR
    size = config.get(SIZE, getattr(_class(row.config)(), SIZE, 224))
    own = _sides(size)
    channels = config.get("num_channels", 3)
    usual = InputConfig(
        input_size=(channels, *own), mean=row.scale[0], std=row.scale[1], interpolation="bicubic", crop_pct=1.0,
        crop_mode="squash",
    )  # fmt: skip
    if not path.is_file():
        return usual, [f"{folder} has no {PROCESSOR}: mean, standard deviation and resizing are guessed, as usual for its kind"]
    body = _json(path)
    missing = [name for name in ("image_mean", "image_std", "size", "resample") if body.get(name) is None]
    if body.get("do_normalize") is False:
        body |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    factor = body.get("rescale_factor", 1 / 255)
    if body.get("do_rescale") is False:
        raise UserError(f"{path} leaves pixels at 0..255 (do_rescale is false), and models here get 0..1; {ELSE}")
    if not isinstance(factor, (int, float)) or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise UserError(f"{path} scales pixels by {shown(factor)} and not to 0..1; {ELSE}")
    change: dict[str, Any] = {}
    if body.get("image_mean") is not None and body.get("image_std") is not None:
        change |= {"mean": body["image_mean"], "std": body["image_std"]}
    if body.get("resample") is not None:
        change["interpolation"] = FILTERS.get(body["resample"])
    try:
        change |= _resized(body, own, channels)
        given = InputConfig.model_validate({**usual.model_dump(), **change})
    except UserError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        reason = reason_of(error, 120)
        raise UserError(f"{path} does not say how images are resized ({reason}); save it with transformers again") from error
    notes = [f"{path} lacks {', '.join(missing)}: guessed, as usual for its kind"] if missing else []
    return given, notes


def _resized(body: dict[str, Any], own: tuple[int, int], channels: int) -> dict[str, Any]:
    """`size`, `crop_size` and so on of an image processor as timm describes them."""
    size, crop = body.get("size"), body.get("crop_size")
    if size is None or body.get("do_resize") is False:
        return {}
    target = _sides(crop) if body.get("do_center_crop", crop is not None) and crop is not None else None
    share = body.get("crop_pct")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    if isinstance(size, int) and target is not None:
        shortest = size
    if shortest is None:
        resized = _sides(size)
        return _described(target or resized, resized, "squash", channels)
    if share is not None and shortest < 384:  # a ConvNeXt's processor: the shorter side first, then the middle
        return {**_described((shortest, shortest), (shortest, shortest), "center", channels), "crop_pct": share}
    if share is not None:
        return _described((shortest, shortest), (shortest, shortest), "squash", channels)
    if target is None:  # the model takes one size all the same
        return _described(own, (max(shortest, min(own)),), "center", channels)
    return _described(target, (shortest,), "center", channels)


def _described(final: tuple[int, int], resized: tuple[int, ...], mode: str, channels: int) -> dict[str, Any]:
    """Images of `final` out of the middle of ones whose sides, or shorter side, are `resized`, as a share for timm: it divides by
    that and rounds down, so the share is nudged where it would lose a pixel."""
    sides = final if len(resized) > 1 else (min(final),)
    shares = [1.0, sides[0] / resized[0], *(side / (pixels + 0.5) for side, pixels in zip(sides, resized, strict=True))]
    for share in shares:
        if share <= 1 and [math.floor(side / share) for side in sides] == list(resized):
            return {"input_size": (channels, *final), "crop_pct": share, "crop_mode": mode}
    cut, whole = (" x ".join(map(str, each)) for each in (final, resized))
    raise UserError(f"the processor cuts {cut} pixels out of {whole}, which is no share of both sides; {ELSE}")


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    return int(size[0]), int(size[1])


def _check(spec: ModelSpec) -> None:
    if spec.timm_name not in ARCHITECTURES:
        raise UserError(f"{shown(spec.timm_name)} is no vision model of transformers that is known here")
    row = ARCHITECTURES[spec.timm_name]
    own = _own_fields(row.config)
    for name in (spec.config or {}).keys() | spec.kwargs.keys():
        if name not in own | {"num_labels", "num_classes", "in_chans"}:
            raise UserError(f"{spec.called} has no argument {shown(name)}; {row.config} of transformers lists them")


def _create(spec: ModelSpec) -> nn.Module:
    row = ARCHITECTURES[spec.timm_name]
    values = {**(spec.config or {}), **spec.kwargs}
    labels = values.pop("num_labels", 2)
    labels = values.pop("num_classes", labels)
    if "in_chans" in values:
        values["num_channels"] = values.pop("in_chans")
    with _quiet():
        config = _class(row.config)(**values)
        if _classifies(spec):
            config.num_labels = labels
        top = config
        if row.whole:
            top = _class(row.whole)(vision_config=config.to_dict())
            top.num_labels = labels
        for each in (top, getattr(top, "vision_config", top)):
            each._attn_implementation = "eager"  # every model has it, it exports with masks too, and its products are counted
        net = _class(spec.timm_name)(top)
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
        made, found = type(net).from_pretrained(
            None, config=net.config, state_dict=dict(kept), output_loading_info=True, ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )  # fmt: skip
    missing, mismatched = set(found["missing_keys"]), {item[0]: item[1] for item in found["mismatched_keys"]}
    result = {name: tensor for name, tensor in made.state_dict().items() if name not in missing | mismatched.keys()}
    for name, shape in mismatched.items():
        result[name] = kept.get(name, torch.empty(shape, device="meta"))
    result |= {name: kept[name] for name in found["unexpected_keys"] if name in kept}
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
