"""What a reader of a report sees of a model: accuracy per class, the images whose class changed, the patches of each expert.

`examples.json` holds small pictures as JPEG in base64, and no more than `MAX_BYTES` of them.
"""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from exporter.belonging import BELONGS_TO, source_ids
from exporter.plots.data import BATCH, RoutingTrace, expert_patches, trace_routes
from exporter.plots.tiles import cut, key
from moee.artifacts.model import MoeeModel
from moee.data.image_set import ImageSet, batches
from moee.data.sources import located
from moee.data.transform import MODES, Transform, model_transform
from moee.interface.adapted import run_model
from moee.measure.accuracy import NO_ANSWER, comparison, top1
from moee.measure.probe import classes_told, head_drawn
from moee.places.inputs import source_paths
from moee.places.output_file import OutputFile
from moee.progress import Reporter, silent, track
from moee.store.result_kinds import EXAMPLES

SCHEMA = "moee.examples/1"
MAX_BYTES = 700 << 10  # of all pictures, in base64; a page holds 3 MiB with its plots
CHANGED, SIDE = 36, 96  # images that are shown, and the longer side of each in pixels
MAX_EXPERTS = 16  # rows of patches a layer; the busiest experts are shown
TILE = 24  # pixels of a patch at most; a smaller one stays as it is
QUALITY = 85  # of JPEG
ONE_EXPERT = "it has one expert, which takes every token"


def write_examples(
    moee: MoeeModel, held_out: ImageSet, path: Path | str, *, images: int = 256, dense: nn.Module | None = None,
    source: Path | str | None = None, force: bool = False, report: Reporter = silent,
) -> Path:  # fmt: skip
    """Write the file `path`, which `moee report` shows: accuracy per class, changed images and patches of the experts, on at most
    `images` held-out images, spread evenly.

    `dense`: the model that it was cut from, where that is at hand (default: loaded). `source`: the artifact's folder, which the
    file then says it belongs to. Raises `UserError` if the dense model's weights are
    lost, or if `path` may not be replaced.
    """
    output = OutputFile(path, EXAMPLES, force, source_paths(source))
    output.check()
    trace = trace_routes(moee, held_out, images, report)
    body = make_examples(moee, moee.dense() if dense is None else dense, held_out, trace, report)
    output.write_json({**body, BELONGS_TO: source_ids(source)})
    return Path(path)


def make_examples(
    moee: MoeeModel, dense: nn.Module, held_out: ImageSet, trace: RoutingTrace, report: Reporter = silent
) -> dict[str, Any]:
    """The body of `examples.json` for the images of `trace`, on which the `dense` model runs here.

    {"classes": {"why", "rows": [{"name", "images", "dense", "moee"}]}: images that each model names rightly, or why there are no
    rows; "changed": {"why", "lost", "gained", "other", "shown"}; "experts": {"layers": [...], "left_out": {layer: why}}}.
    """
    dense_outputs = _outputs(dense, held_out, trace.indices, report)
    ours = trace.outputs
    if moee.probe is not None:
        dense_outputs, ours = moee.probe.logits(dense_outputs), moee.probe.logits(ours)
    told = classes_told(dense, moee.probe)
    drawn = head_drawn(moee.spec, moee.probe)
    compared = comparison(
        trace.labels, held_out.num_classes, told, held_out.name, logits=dense_outputs, drawn=drawn, probe=moee.probe is not None,
        unknown=held_out.unknown,
    )  # fmt: skip
    pictures = _Pictures(held_out, model_transform(moee.model))
    answers = (top1(dense_outputs), top1(ours)) if told > 1 else None
    names = moee.classes or held_out.classes
    changed = _changed(pictures, trace, answers, names)  # first: the patches get what these leave of the bytes
    return {
        "schema": SCHEMA, "data": located(held_out.name), "images": len(trace.indices), "of_images": len(held_out),
        "classes": {"why": compared.reason, "rows": _classes(trace.labels, answers, names) if compared and answers else []},
        "changed": changed, "experts": _experts(pictures, trace, report),
    }  # fmt: skip


@torch.inference_mode()
def _outputs(model: nn.Module, data: ImageSet, indices: Tensor, report: Reporter) -> Tensor:
    """Outputs [N, C] on the images numbered `indices` [N], all of which could be read a moment ago."""
    read = track(batches(data, BATCH, order=indices), "dense model", math.ceil(len(indices) / BATCH), report)
    return torch.cat([run_model(model, batch.images)[0] for batch in read])


def _classes(labels: Tensor, answers: tuple[Tensor, Tensor], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Of every class that has an image: how many it has, and how many both models name rightly; what lost most comes first."""
    rows = []
    for label in labels[labels >= 0].unique().tolist():
        own = labels == label
        right = [int((answer[own] == label).sum()) for answer in answers]
        rows.append({"name": _name(label, names), "images": int(own.sum()), "dense": right[0], "moee": right[1]})
    return sorted(rows, key=lambda row: ((row["moee"] - row["dense"]) / row["images"], row["moee"] / row["images"]))


def _name(label: int, names: tuple[str, ...]) -> str:
    if label < 0:
        return "no answer" if label == NO_ANSWER else ""
    return names[label] if label < len(names) else str(label)


def _changed(
    pictures: _Pictures, trace: RoutingTrace, answers: tuple[Tensor, Tensor] | None, names: tuple[str, ...]
) -> dict[str, Any]:
    """The images to which the two models give another class: first those that lost the right one, then those that gained it."""
    if answers is None:
        return {"why": "neither the model nor a probe tells classes apart", "lost": 0, "gained": 0, "other": 0, "shown": []}
    before, after = answers
    labels = trace.labels
    differ = before != after
    lost, gained = differ & (before == labels), differ & (after == labels)
    other = differ & ~lost & ~gained
    shown = []
    for position in torch.cat([kind.nonzero()[:, 0] for kind in (lost, gained, other)])[:CHANGED].tolist():
        index = int(trace.indices[position])
        shown.append(
            {
                "label": _name(int(labels[position]), names), "dense": _name(int(before[position]), names),
                "moee": _name(int(after[position]), names), **pictures.whole(index),
            }
        )  # fmt: skip
    return {"why": "", "lost": int(lost.sum()), "gained": int(gained.sum()), "other": int(other.sum()), "shown": shown}


def _experts(pictures: _Pictures, trace: RoutingTrace, report: Reporter) -> dict[str, Any]:
    """Per layer its busiest experts, with the patches nearest their router rows; fewer where the pictures grow too large."""
    numbers = expert_patches(trace)
    left_out = {**numbers["left_out"], **{n: ONE_EXPERT for n, count in trace.experts.items() if count == 1}}
    routed = {name: experts for name, experts in numbers["layers"].items() if name not in left_out}
    busiest = {n: sorted(range(len(experts)), key=lambda e: -experts[e]["share"])[:MAX_EXPERTS] for n, experts in routed.items()}
    places = {name: [place for e in chosen for place in routed[name][e]["patches"]] for name, chosen in busiest.items()}
    tiles = cut(places, pictures.data, pictures.transform, report)
    layers: list[dict[str, Any]] = []
    for name, experts in routed.items():
        rows = []
        for e in busiest[name]:
            nearest = experts[e]["patches"]
            strip = pictures.strip([tiles[name][key(place)] for place in nearest])
            rows.append({"expert": e, "share": experts[e]["share"], "patches": len(nearest), **strip})
        layers.append({"name": name, "of": len(experts), "experts": rows})
    most = MAX_EXPERTS
    while most > 1 and sum(len(row.get("picture", "")) for layer in layers for row in layer["experts"]) > pictures.left:
        most -= 1
        layers = [{**layer, "experts": layer["experts"][:most]} for layer in layers]
    return {"layers": layers, "left_out": left_out}


class _Pictures:
    """Small JPEG pictures of a set's images as the model sees them, and how many bytes of them are `left`."""

    def __init__(self, data: ImageSet, transform: Transform):
        self.data, self.transform, self.left = data, transform, MAX_BYTES

    def whole(self, index: int) -> dict[str, Any]:
        """A thumbnail of image `index`."""
        entry = self._encoded(self.transform.pixels(self.data.load(index)).clamp(0, 1), SIDE)
        self.left -= len(entry.get("picture", ""))
        return entry

    def strip(self, tiles: list[Tensor]) -> dict[str, Any]:
        """Patches side by side, a white pixel between them."""
        parts = []
        for tile in tiles:
            if (longer := max(tile.shape[1:])) > TILE:
                size = [max(1, round(side * TILE / longer)) for side in tile.shape[1:]]
                tile = nn.functional.interpolate(tile[None], size, mode="area")[0]
            parts.append(nn.functional.pad(tile, (0, 1), value=1.0))
        return self._encoded(torch.cat(parts, 2)[..., :-1], None) if parts else {}

    @staticmethod
    def _encoded(pixels: Tensor, side: int | None) -> dict[str, Any]:
        """[C, H, W] in 0..1 as JPEG; nothing where no picture has so many channels."""
        if len(pixels) not in MODES:
            return {}
        levels = (pixels * 255).round().to(torch.uint8).movedim(0, -1).numpy()
        image = Image.fromarray(levels[..., 0] if len(pixels) == 1 else levels, MODES[len(pixels)])
        if side is not None:
            image.thumbnail((side, side))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY, subsampling=0)
        return {"picture": base64.b64encode(file.getvalue()).decode(), "width": image.width, "height": image.height}
