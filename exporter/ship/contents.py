"""What every bundle holds, read from an export and checked: graphs, how images are prepared, the classifier, class names."""

from __future__ import annotations

import logging
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from exporter.belonging import BELONGS_TO, export_ids, refuse_replaced
from exporter.engines.build import count_plugin_nodes
from exporter.graph.export import DENSE, DENSE_DATA, MANIFEST, MOEE_DATA, PORTABLE, TENSORRT
from exporter.manifests import exported_model, read_export
from exporter.onnx_safety import check_onnx
from moee.artifacts.checkpoint import PROBE, Word
from moee.data.transform import Transform
from moee.errors import UserError
from moee.interface.adapted import guesses_of
from moee.libraries.preparation import described
from moee.measure.probe import Probe
from moee.schema import shown
from moee.store.artifact import sha256_file
from moee.weights.weights_file import read_safetensors

log = logging.getLogger("moee")
MODELS = (DENSE, PORTABLE, TENSORRT, DENSE_DATA, MOEE_DATA, MANIFEST)  # of an export, what a device gets
TYPES: dict[int, str] = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}


@dataclass(frozen=True)
class Tensor:
    """An input or output of the graph without its batch dimension."""

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Preprocessing:
    """timm's evaluation transform: the image is shrunk or enlarged until it just covers `resize` (or to it, if `crop` is squash),
    then the middle `size`; each height and width."""

    size: tuple[int, int]
    resize: tuple[int, int]
    crop: str
    filter: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Head:
    """`head.bin`: int32 classes, int32 features, float32 weights [classes, features], float32 bias [classes], little-endian."""

    classes: int
    content: bytes


@dataclass(frozen=True)
class Contents:
    """`export`: the checked manifest. `given` and `output`: of its graphs. `classifies`: the graph gives class scores, else
    `head`, where there is one, tells the `classes` apart. `names` of the classes; none where they are not known. `guessed`: what
    nobody said of how images are prepared. `title`: the model's name, fit to be shown."""

    export: dict[str, Any]
    given: Tensor
    output: Tensor
    plugin_nodes: int
    recipe: Preprocessing
    guessed: tuple[str, ...]
    head: Head | None
    classes: int | None
    classifies: bool
    names: tuple[str, ...]
    title: str

    def to_json(self) -> dict[str, Any]:
        """What `deployment.json` says of them."""
        return {
            "model": self.export["model"], "input": vars(self.given), "output": vars(self.output),
            "preprocess": vars(self.recipe), "classes": self.classes, "preprocess_guessed": list(self.guessed),
            "class_names": list(self.names), "plugin_nodes": self.plugin_nodes, BELONGS_TO: export_ids(self.export),
        }  # fmt: skip


def read_contents(export_dir: Path, word: Word | None = None, probe: Probe | None = None) -> Contents:
    """`word` as in `exported_model`; `probe`: the classifier of a model that ends in features, where it does not lie beside the
    artifact. Raises `UserError` for a foreign or damaged export, or a pre-processing that the runners cannot do."""
    export = read_export(export_dir)
    given, output = graph_tensors(export_dir / TENSORRT)
    check_models(export_dir)
    nodes = count_plugin_nodes(export_dir / TENSORRT)
    if export.get("plugin_nodes") not in (nodes, None):
        says = export["plugin_nodes"]
        raise UserError(f"{export_dir / TENSORRT} has {nodes} plugin nodes, its manifest says {says}; export again")
    model, transform = exported_model(export, export_dir, word)
    recipe = make_preprocessing(transform, str(export["model"]["timm_name"]))
    _, guessed = guesses_of(model)
    if guessed:
        log.warning(
            "nobody said how the model's images are prepared; the bundle's runner does as was guessed: %s. Extract again with a "
            "model that says it", described(transform.config, guessed),
        )  # fmt: skip
    if given.shape != (3, *recipe.size):
        says = " x ".join(map(str, recipe.size))
        raise UserError(f"{export_dir / TENSORRT} takes {given.shape}, its manifest says size {says}; export again")
    classifies = ends_in_classes(model)
    head = None if classifies else read_head(export_dir, export, output, probe)
    classes = output.shape[-1] if classifies else head.classes if head is not None else None
    if classes is None and export.get("classes"):
        raise UserError(_lost_head(export, export_dir))
    names, title = _names(export, classes, export_dir), shown(export["model"]["name"], quoted=False)
    return Contents(
        export, given, output, nodes, recipe, tuple(guessed), head, classes, classifies, names, title
    )  # fmt: skip


def graph_tensors(path: Path) -> tuple[Tensor, Tensor]:
    """The input and the output of a graph. Raises `UserError` unless there is one of each, static beside the batch."""
    graph = check_onnx(path).graph
    if len(graph.input) != 1 or len(graph.output) != 1:
        raise UserError(f"{path} has {len(graph.input)} inputs and {len(graph.output)} outputs; expected one of each")
    return _tensor(path, graph.input[0]), _tensor(path, graph.output[0])


def _tensor(path: Path, value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    shape = tuple(d.dim_value for d in kind.shape.dim[1:])
    if kind.elem_type not in TYPES or not shape or min(shape) < 1:
        raise UserError(f"{path}: {value.name} must be float32 or float16 with only its batch dynamic; export it again")
    if not re.fullmatch(r"[\w./:-]{1,200}", value.name, re.ASCII):  # it is written into configurations and scripts
        raise UserError(f"{path}: the name {shown(value.name)} holds more than letters, digits and . / : - _; export it again")
    return Tensor(value.name, TYPES[kind.elem_type], shape)


def make_preprocessing(transform: Transform, name: str) -> Preprocessing:
    """timm's evaluation transform of the model called `name` as the runner does it.

    Raises `UserError` for a filter, crop mode or number of channels that the runner does not know.
    """
    channels, height, width = transform.shape
    crop, kind = str(transform.config["crop_mode"]), str(transform.config["interpolation"])
    if channels != 3:
        counted = "1 channel" if channels == 1 else f"{channels} channels"
        raise UserError(f"{name} takes images of {counted}; the bundle knows RGB alone")
    if crop not in ("center", "squash") or kind not in ("bicubic", "bilinear"):
        raise UserError(f"{name} is evaluated with {kind} resizing and crop mode {crop}; the runner knows bicubic and "
                        "bilinear, center and squash")  # fmt: skip
    tall, wide = (max(side, int(side / float(transform.config["crop_pct"]))) for side in (height, width))
    return Preprocessing((height, width), (tall, wide), crop, kind, transform.mean, transform.std)


def check_models(export_dir: Path) -> None:
    """Raise `UserError` for a file of the export that lacks, or a graph that must not be copied."""
    for name in MODELS:
        if not (export_dir / name).is_file():
            raise UserError(f"{export_dir / name} is missing; export again")
        if name.endswith(".onnx"):
            check_onnx(export_dir / name)


def ends_in_classes(model: nn.Module) -> bool:
    """Whether the model gives class scores, and not features or a single logit, whose largest says nothing."""
    return int(getattr(model, "num_classes", 0)) > 1


def read_head(export_dir: Path, export: dict[str, Any], output: Tensor, probe: Probe | None = None) -> Head | None:
    """The classifier of a graph that ends in features: `probe`, or the one beside the exported model; None without one. Raises
    `UserError` for one that does not fit the graph."""
    if probe is not None:
        source, state = "the model's probe", probe.state()
    elif not export.get("source"):
        return None
    else:
        source = export_dir / export["source"] / PROBE
        refuse_replaced(export, source.parent)
        if not source.is_file():
            return None
        state = read_safetensors(source)
    if not {"weight", "bias"} <= state.keys():
        raise UserError(f"{source} should hold weight and bias; extract the model again")
    weight, bias = (state[key].float().numpy().astype("<f4") for key in ("weight", "bias"))
    if len(bias) < 2:
        raise UserError(f"{source} has one row, by which every image is of class 0; extract the model again")
    if weight.shape != (len(bias), output.shape[-1]) or not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise UserError(f"{source} does not fit the graph's {output.shape[-1]} features; extract the model again")
    return Head(len(bias), struct.pack("<ii", *weight.shape) + weight.tobytes() + bias.tobytes())


def _lost_head(export: dict[str, Any], export_dir: Path) -> str:
    """Why a graph that ends in features has class names and no classifier, and what to do."""
    count, where = len(export["classes"]), export.get("source")
    if where is None:
        cure = "give the model that was exported, with model="
    else:
        cure = f"put the artifact back to {(export_dir / where).resolve()}, or export again"
    return f"{export_dir / MANIFEST} names {count} classes; the classifier that tells them apart lies beside the artifact: {cure}"


def _names(export: dict[str, Any], classes: int | None, export_dir: Path) -> tuple[str, ...]:
    """Names of the classes; none where the export does not know them. Raises `UserError` for names of other classes."""
    names = tuple(export.get("classes", ()))
    if names and len(names) != classes:
        raise UserError(f"{export_dir / MANIFEST} names {len(names)} classes, the model tells {classes or 0} apart; export again")
    return names


def write_sums(folder: Path) -> None:
    """`SHA256SUMS`, which build.sh checks with sha256sum before it does anything."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    lines = [f"{sha256_file(file)}  {file.relative_to(folder).as_posix()}" for file in files]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n", encoding="utf-8")
