"""What `export.json` and `engine.json` must hold. Every reader of one goes through here."""

from __future__ import annotations

import logging
import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, StringConstraints, field_validator, model_validator

from exporter.precision import Quantization
from moee.artifacts.manifest import Classes, Costs
from moee.config import MAX_SIDE
from moee.cures import cures
from moee.errors import UserError, printable
from moee.models.ffn import plain_size
from moee.models.model import ModelSpec, Shape
from moee.schema import Body, Text, checked, shown
from moee.store.artifact import read_manifest, sha256_file, stays_inside
from moee.store.result_kinds import CARD
from moee.store.wrong_folder import another_kind

if TYPE_CHECKING:
    from torch import nn

    from moee.artifacts.checkpoint import Word
    from moee.artifacts.model import ImageRecord
    from moee.data.transform import Transform

log = logging.getLogger("moee")

EXPORT, EXPORT_SCHEMA = "export.json", "moee.export/1"
ENGINE, ENGINE_SCHEMA = "engine.json", "moee.engine/1"
EXPORT_FILES = (
    "dense.onnx", "portable.onnx", "tensorrt.onnx", "runtime.onnx", "reference.onnx", "dense.data", "moee.data", "reference.data",
    CARD,
)  # fmt: skip
# Back end: Python module, wheel that holds its libraries, extra of this project.
BACKENDS = {"tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_libs", "rtx"), "tensorrt": ("tensorrt", None, "trt")}
MAX_CHANNELS = 1 << 10  # of images; satellites have hundreds
MAX_BATCH = 1 << 16
TRUSTED_BATCH = {"min": 1, "opt": 8, "max": 32}  # of an engine that nothing is known of: `moee build`'s defaults

Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0)]


class Input(Body):
    """What the graphs take. `size` is the side of a square, or [height, width]; pixels."""

    name: Text
    channels: int = Field(3, ge=1, le=MAX_CHANNELS)
    size: int | list[int]
    mean: list[float]
    std: list[Positive]

    @field_validator("size", mode="plain")
    @classmethod
    def _sides(cls, size: Any) -> int | list[int]:
        sides = size if isinstance(size, list) else [size, size]
        if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
            raise ValueError(f"expected the side of a square, 1 to {MAX_SIDE} pixels, or [height, width]")
        return size

    @model_validator(mode="after")
    def _fits(self) -> Input:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(f"expected {self.channels} numbers as {name}, one a channel, came {len(getattr(self, name))}")
        return self


class Export(Body):
    """The body of `export.json`; fields that came later than the first version have defaults."""

    input: Input
    precision: Text = "fp32"
    model: ModelSpec
    data: Text
    classes: Classes = []
    cost: Costs | None = None
    source: Text | None = None
    belongs_to: dict[str, Sha256] = {}
    routed_layers: list[Text]  # none where the dense model itself was exported
    experts: dict[str, int] = {}
    merged_tokens: dict[str, int] = {}  # by block; none where no tokens merge
    clear_forms: dict[str, Text] = {}
    plugin_nodes: int | None = Field(None, ge=0)
    graphs: dict[str, Text] = {}
    quantization: dict[str, Quantization] | None = None
    seed: int = Field(0, ge=0, lt=2**63)

    @field_validator("graphs")
    @classmethod
    def _plain(cls, graphs: dict[str, str]) -> dict[str, str]:
        for name in graphs.values():
            plain_name(name)
        return graphs


class Batch(Body):
    min: int = Field(ge=1)
    opt: int
    max: int = Field(le=MAX_BATCH)

    @model_validator(mode="after")
    def _ordered(self) -> Batch:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"expected min <= opt <= max, came {self.min}/{self.opt}/{self.max}")
        return self


class Plan(Body):
    file: Text
    sha256: Sha256
    size_bytes: int = Field(ge=0)
    build_s: float = Field(ge=0)

    @field_validator("file")
    @classmethod
    def _plain(cls, name: str) -> str:
        return plain_name(name)


class Plugin(Body):
    """The library that the MoEE engine needs; `file` is empty for none."""

    file: Text
    sha256: Annotated[str, StringConstraints(pattern="^([0-9a-f]{64})?$")]
    headers: Text

    @field_validator("file")
    @classmethod
    def _plain(cls, name: str) -> str:
        return plain_name(name) if name else name


class Plans(Body):
    dense: Plan
    moee: Plan


class Engines(Body):
    """The body of `engine.json`."""

    builder: Text = Field(min_length=1)
    target: Text
    batch: Batch
    plugin: Plugin
    plugin_layers: int = Field(ge=0)
    source_sha256: Text | None = None
    belongs_to: dict[str, Sha256] = {}
    engines: Plans

    @field_validator("builder")
    @classmethod
    def _known(cls, builder: str) -> str:
        if builder.split(" ")[0] not in BACKENDS:
            raise ValueError(f"expected one of {', '.join(BACKENDS)}")
        return builder


def input_body(name: str, transform: Transform) -> dict[str, Any]:
    """What `export.json` says of the graphs' input."""
    channels, *_ = transform.shape
    size = plain_size(transform.shape)
    return {"name": name, "channels": channels, "size": size, "mean": transform.mean, "std": transform.std}


def input_shape(given: dict[str, Any]) -> Shape:
    """The shape of one image that the graphs take, from the input of a checked `export.json`."""
    size = given["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return given.get("channels", 3), height, width


def exported_model(manifest: dict[str, Any], folder: Path | str, word: Word | None = None) -> tuple[nn.Module, Transform]:
    """The model of a checked `export.json` on the device meta, and how its images are prepared: as the model that was exported
    says it, whether in timm's table or in its own files. `word`: the user's function that it comes from
    (`moee.artifacts.checkpoint.load`).

    Raises `UserError` for a model that timm does not make here, or that takes other images than the manifest's graphs.
    """
    from moee.artifacts.checkpoint import laid_out, vouched
    from moee.data.transform import model_transform

    path, given = Path(folder) / EXPORT, manifest["input"]
    model = laid_out(vouched(ModelSpec(**manifest["model"]), word), path)
    transform = model_transform(model)
    size, wanted = (" x ".join(map(str, shape)) for shape in (input_shape(given), transform.shape))
    if size != wanted:
        raise UserError(f"{path} says images of {size}, its model takes {wanted} (channels, height, width); export again")
    for name in ("mean", "std"):
        said, own = given[name], getattr(transform, name)
        if not all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(said, own, strict=True)):
            raise UserError(f"{path} says {name} {said}, its model is prepared with {list(own)}; export again")
    return model, transform


def image_record(manifest: dict[str, Any], folder: Path | str, word: Word | None = None) -> ImageRecord:
    """How the images of the exported artifact are read again. Raises `UserError` as `exported_model`."""
    from moee.artifacts.model import ImageRecord, head_classes

    model, transform = exported_model(manifest, folder, word)
    classes = tuple(manifest.get("classes", ()))
    return ImageRecord(manifest["data"], transform, manifest.get("seed", 0), classes, head_classes(model))


def plain_name(name: str) -> str:
    """`name`, if it is a file's in the manifest's own folder. Raises `ValueError` otherwise."""
    if Path(name).name != name or not printable(name):
        raise ValueError("expected a file of that folder")
    return name


def read_export(folder: Path | str, verify: bool = True) -> dict[str, Any]:
    """`export.json`, its fields checked and, with `verify`, the hashes of all files that are read from an export.

    Raises `UserError` for a missing, foreign or damaged one.
    """
    manifest = read_manifest(folder, EXPORT, EXPORT_SCHEMA, verify)
    checked(Export, manifest, Path(folder) / EXPORT)
    unlisted = [name for name in EXPORT_FILES if name not in manifest["files"] and (Path(folder) / name).exists()]
    if verify and unlisted:
        raise UserError(f"{Path(folder) / EXPORT} has no hash of {unlisted[0]}, which lies beside it; export again")
    return manifest


def refuse_lost_dense(manifest: dict[str, Any], folder: Path | str) -> None:
    """Raise `UserError` for an export whose dense graph holds other weights than the model was extracted from: both were drawn
    at random, each anew, by a version that recorded no seed."""
    if not ModelSpec(**manifest["model"]).has_weights:
        raise UserError(
            f"the dense model of {folder} is lost: its weights were drawn at random, and the seed was not recorded, so "
            "dense.onnx is another model; extract again with --pretrained, --checkpoint FILE or --random-weights SEED"
        )


def of_module(manifest: dict[str, Any]) -> bool:
    """Whether an export's model was a module in Python, which no command can make again."""
    return ModelSpec(**manifest["model"]).library == "module"


def refuse_module(manifest: dict[str, Any], folder: Path | str, call: str) -> None:
    """Raise `UserError` for an export whose model only Python can give. `call`: what to run there."""
    if of_module(manifest):
        name = shown(manifest["model"]["name"], quoted=False)
        raise UserError(
            f"{folder} was exported from a module in Python ({name}), which only Python can give; run there {call}"
        )


def read_engine(folder: Path | str, trust: bool = False) -> dict[str, Any]:
    """`engine.json`, its fields checked; who loads a plan or a library compares it with its hash first.

    With `trust`, a folder without a usable one is described by what lies in it. Raises `UserError`.
    """
    try:
        manifest = read_manifest(folder, ENGINE, ENGINE_SCHEMA, verify=False)
        checked(Engines, manifest, Path(folder) / ENGINE)
    except UserError as error:
        if not trust and Path(folder).is_dir() and another_kind(Path(folder), ENGINE):
            raise
        if not trust:
            trusted = cures(", and --trust-engine loads one that nothing vouches for")
            raise UserError(f"{error}; an engine is code{trusted}") from error
        log.warning("--trust-engine: %s", error)
        return _assumed(Path(folder))
    return manifest


def _assumed(folder: Path) -> dict[str, Any]:
    """A manifest for an engine folder that has none: every plan in it, and the one plugin library."""
    plans = {name: folder / f"{name}.plan" for name in ("dense", "moee")}
    missing = [path for path in plans.values() if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]} not found; expected dense.plan and moee.plan, as moee build writes them")
    libraries = sorted(folder.glob("*.so"))
    if len(libraries) > 1:
        raise UserError(f"{folder} holds {len(libraries)} libraries and no {ENGINE} that says which; leave the plugin's alone")
    backend = next((name for name, (module, _, _) in BACKENDS.items() if find_spec(module) is not None), "tensorrt")
    plugin = {"file": libraries[0].name, "sha256": sha256_file(libraries[0]), "headers": ""} if libraries else None
    return {
        "builder": f"{backend} (trusted, not known)", "target": "not known", "batch": TRUSTED_BATCH,
        "plugin": plugin or {"file": "", "sha256": "", "headers": ""}, "plugin_layers": len(libraries), "source_sha256": None,
        "engines": {
            name: {"file": path.name, "sha256": sha256_file(path), "size_bytes": path.stat().st_size, "build_s": 0.0}
            for name, path in plans.items()
        },
    }  # fmt: skip


def code_file(folder: Path, name: str) -> Path:
    """A plan or library of an engine folder. Raises `UserError` for a name that leaves it, by a link or otherwise."""
    if not stays_inside(folder, name):
        raise UserError(f"{folder / ENGINE} names {shown(name)}, which leaves its folder; do not use this engine")
    return folder / name
