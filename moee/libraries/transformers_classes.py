"""The classes of transformers that are known here, and the fields that their configurations have."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from moee.errors import MissingDependency, UserError

HALF = ((0.5,) * 3, (0.5,) * 3)
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
CLIP = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
Scale = tuple[tuple[float, ...], tuple[float, ...]]


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


def own_fields(config: str) -> set[str]:
    """Fields that a configuration class adds to the common ones, but for those that choose among implementations."""
    kind = class_named(config)
    fields = set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}
    for base in kind.__mro__:
        if not base.__module__.endswith("configuration_utils"):
            fields |= set(vars(base).get("__annotations__", {}))
    base = next(base for base in kind.__mro__ if base.__module__.endswith("configuration_utils"))
    common = set(inspect.signature(base.__init__).parameters) | set(vars(base).get("__annotations__", {}))
    return {name for name in fields - common if not name.startswith("_")}


def class_named(name: str) -> Any:
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
