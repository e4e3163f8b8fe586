"""How an image processor of transformers prepares images, as timm describes it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moee.errors import UserError
from moee.interface.spec import InputConfig
from moee.libraries.transformers_classes import Architecture, class_named
from moee.schema import parse_json, reason_of, shown

PROCESSOR = "preprocessor_config.json"
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # by Pillow's numbers
SIZE = "image_size"
ELSE = "give the model as package.module:function"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `UserError` for anything else."""
    try:
        body = parse_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({reason_of(error)}); save the model with transformers again") from error
    if not isinstance(body, dict):
        raise UserError(f"{path} holds no JSON object; save the model with transformers again")
    return body


def read_input(folder: Path, row: Architecture, config: dict[str, Any]) -> tuple[InputConfig, list[str]]:
    """How images are prepared, and what the folder does not say of it. Raises `UserError` for what cannot be done here."""
    path = folder / PROCESSOR
    size = config.get(SIZE, getattr(class_named(row.config)(), SIZE, 224))
    model_sides = _sides(size)
    channels = config.get("num_channels", 3)
    usual = InputConfig(
        input_size=(channels, *model_sides), mean=row.scale[0], std=row.scale[1], interpolation="bicubic", crop_pct=1.0,
        crop_mode="squash",
    )  # fmt: skip
    if not path.is_file():
        return usual, [f"{folder} has no {PROCESSOR}: mean, standard deviation and resizing are guessed, as usual for its kind"]
    body = read_object(path)
    missing = [name for name in ("image_mean", "image_std", "size", "resample") if body.get(name) is None]
    if body.get("do_normalize") is False:
        body |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    factor = body.get("rescale_factor", 1 / 255)
    if body.get("do_rescale") is False:
        raise UserError(f"{path} leaves pixels at 0..255 (do_rescale is false), and models here get 0..1; {ELSE}")
    if not isinstance(factor, (int, float)) or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise UserError(f"{path} scales pixels by {shown(factor)} and not to 0..1; {ELSE}")
    change: dict[str, Any] = {}
    for name in ("mean", "std"):
        if body.get(f"image_{name}") is not None:
            change[name] = body[f"image_{name}"]
    if body.get("resample") is not None:
        change["interpolation"] = FILTERS.get(body["resample"])
    try:
        change |= _resized(body, model_sides, channels)
        given = InputConfig.model_validate({**usual.model_dump(), **change})
    except UserError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        reason = reason_of(error, 120)
        raise UserError(f"{path} does not say how images are resized ({reason}); save it with transformers again") from error
    notes = [f"{path} lacks {', '.join(missing)}: guessed, as usual for its kind"] if missing else []
    return given, notes


def _resized(body: dict[str, Any], model_sides: tuple[int, int], channels: int) -> dict[str, Any]:
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
        return _described(model_sides, (max(shortest, min(model_sides)),), "center", channels)
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
