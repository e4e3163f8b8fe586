"""Patches cut from the images of a set, each image read once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from moee.data.image_set import ImageSet
from moee.data.transform import Transform
from moee.progress import Reporter, silent, track

Place = Mapping[str, Any]  # "image", "top", "left", "height", "width", as `exporter.plots.data.expert_patches` gives it


def key(place: Place) -> tuple[int, int, int]:
    """What tells a patch from another one of the same layer's size."""
    return place["image"], place["top"], place["left"]


def cut(
    layers: Mapping[str, Iterable[Place]], data: ImageSet, transform: Transform, report: Reporter = silent
) -> dict[str, dict[tuple[int, int, int], Tensor]]:
    """Per layer the pixels [C, height, width] in 0..1 of its places, by `key`."""
    wanted: dict[int, list[tuple[str, Place]]] = {}
    for name, places in layers.items():
        for place in places:
            wanted.setdefault(place["image"], []).append((name, place))
    tiles: dict[str, dict[tuple[int, int, int], Tensor]] = {name: {} for name in layers}
    for image in track(sorted(wanted), "patches", len(wanted), report):
        pixels = transform.pixels(data.load(image)).clamp(0, 1)
        for name, place in wanted[image]:
            top, left = place["top"], place["left"]
            tiles[name][key(place)] = pixels[:, top : top + place["height"], left : left + place["width"]].clone()
    return tiles
