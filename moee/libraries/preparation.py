"""Which images a module takes, by what it says itself; what nobody says is guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from moee.errors import UserError
from moee.interface.spec import InputConfig

USUAL = {  # how timm evaluates a model that says nothing else
    "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "interpolation": "bicubic", "crop_pct": 0.875,
    "crop_mode": "center",
}  # fmt: skip
UNSAID = "does not say how its images are prepared"
PREPARATION = ("mean", "std", "crop_pct", "interpolation")
SIZES = ("image_size", "img_size", "input_size")  # attributes that tell the size of the images


def described(config: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """The parts `names` (default: all) of how images are prepared, in words."""
    words = {
        "mean": "mean", "std": "standard deviation", "crop_pct": "share that the middle crop keeps", "interpolation": "filter",
    }  # fmt: skip
    texts = []
    for name in names or words:
        value = config[name]
        shown = " ".join(f"{v:.4g}" for v in value) if isinstance(value, (tuple, list)) else str(value)
        texts.append(f"{words[name]} {shown}")
    return ", ".join(texts)


def says_size(module: nn.Module) -> bool:
    """Whether the module, its configuration or its timm description says which size of images it takes."""
    own: Any = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
    return _own_size(module) is not None or isinstance(own, Mapping) and own.get("input_size") is not None


def described_input(
    module: nn.Module, given: InputConfig, title: str
) -> tuple[dict[str, Any], list[str], tuple[str, ...]]:
    """The module's input as timm describes it, sentences about what was guessed of it, and the names of that. What is `given`
    comes first. Raises `UserError` for a module that does not say its size."""
    own: Any = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
    own = own if isinstance(own, Mapping) else {}
    known = {name: own[name] for name in InputConfig.model_fields if own.get(name) is not None}
    known |= given.model_dump(exclude_none=True)
    guessed = tuple(name for name in PREPARATION if name not in known)
    notes = [f"{title} {UNSAID}; guessed: {described(USUAL, guessed)}"] if guessed else []
    if "input_size" not in known:
        size = _own_size(module)
        if size is None:
            raise UserError(f"{title} does not say which size of images it takes: give --img-size H W, or one number for both")
        known["input_size"] = (channels_of(module), *size)
    return {**USUAL, **known}, notes, guessed


def _own_size(module: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images, where the module or its configuration says it."""
    config = getattr(module, "config", None)
    for owner in (module, config, getattr(config, "vision_config", None), getattr(module, "patch_embed", None)):
        for name in SIZES:
            size = getattr(owner, name, None)
            size = [size, size] if isinstance(size, int) else size
            if isinstance(size, Sequence) and len(size) in (2, 3) and all(isinstance(side, int) for side in size):
                return int(size[-2]), int(size[-1])
    return None


def channels_of(module: nn.Module) -> int:
    """How many channels the images of a model have."""
    for owner in (module, getattr(module, "config", None)):
        for name in ("in_chans", "num_channels", "in_channels"):
            if isinstance(count := getattr(owner, name, None), int):
                return count
    return next((part.in_channels for part in module.modules() if isinstance(part, nn.Conv2d)), 3)
