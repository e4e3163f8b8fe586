"""A trial export before the long work: a model that ONNX cannot express is refused in seconds, not after its extraction.

One layer of the dense model (of each kind, where some MLPs are gated) is replaced by experts that keep everything; the graph is
traced, lowered to standard operators and run by ONNX Runtime, and must give what the model gives. What has passed is remembered
in the cache, by architecture.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import inspect
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporter import manifests
from exporter.graph.trace import to_onnx
from exporter.passes.gated import lower_gated
from exporter.passes.name_routes import name_routed_nodes
from exporter.passes.portable import lower_routed_ffn
from exporter.runners import OnnxRunner
from moee import errors
from moee.cures import cures
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.methods.identity import LIMIT, whole_ffn
from moee.mlps.proof import random_images
from moee.mlps.sites import put_mlp
from moee.models.ffn import FFN
from moee.models.model import ModelSpec, Shape, sharing
from moee.progress import Reporter, silent
from moee.schema import parse_json
from moee.store.artifact import write_json
from moee.store.cache import cache_dir
from moee.store.scratch import temporary_folder
from plugins import contract
from plugins.contract import DOMAIN

SCHEMA = "moee.trial/2"
PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript")  # versions that decide what can be exported; timm's files are hashed
# Of a spec: an architecture has no weights and may have any name.
OTHER = {"name", "labels", "weights", "weights_sha256", "pretrained", "random_seed", "part"}
CURES = ("choose another model", "add --no-trial-export to extract it all the same, without ONNX")


def try_export(spec: ModelSpec, model: nn.Module, ffns: Sequence[FFN], shape: Shape, report: Reporter = silent) -> float:
    """Raise `UserError` with the reason if `model`, the dense model of `spec` with the MLPs `ffns`, cannot be exported to ONNX
    with routed layers, or if the graph gives something else than the model on images of `shape`. `model` stays as it is.

    Gives the seconds that it took, which are few for a model of twelve blocks. One that has passed before under the same versions
    is not tried again; its seconds are those of then.
    """
    kinds = list({type(ffn): ffn for ffn in reversed(ffns)}.values())  # the first of each: gated ones have another graph
    key = _key(spec, model, kinds, shape)
    record, path = {"schema": SCHEMA, "key": key}, cache_dir() / "trials" / f"{key}.json"
    if (seconds := _remembered(path, record)) is not None:
        return seconds
    started = time.perf_counter()
    here = all(parameter.device.type == "cpu" for parameter in model.parameters())
    dense = sharing(model, model) if here else copy.deepcopy(model).cpu()
    routed = sharing(dense, dense)
    for ffn in kinds:
        put_mlp(routed, ffn.name, whole_ffn(ffn).cpu(), ffn.bypassed)
    trials = [("one layer of experts", routed)]
    if len(ffns) == len(kinds):  # else the graph holds dense MLPs as well
        trials.append(("the dense model", dense))
    images = random_images(shape, torch.zeros(()))
    for done, (what, network) in enumerate(trials):
        report("trial export", done, len(trials))
        try:
            off = _deviation(network.eval(), images)
        except UserError as error:
            raise UserError(f"{spec.called}: a trial export of {what} failed: {error}; {cures(*CURES)}") from error
        if not off <= LIMIT:
            raise UserError(
                f"{spec.called}: the exported graph of {what} is off by {off:.2g} of its output's size; {cures(*CURES)}"
            )
    report("trial export", len(trials), len(trials))
    seconds = round(time.perf_counter() - started, 3)
    with suppress(OSError, UserError):  # a cache that cannot be written is no error
        write_json(path, {**record, "seconds": seconds})
    return seconds


def _remembered(path: Path, record: dict[str, str]) -> float | None:
    """The seconds that the cache holds for `record`; None for nothing and for a damaged file."""
    try:
        found = parse_json(path)
    except (OSError, ValueError):
        return None
    seconds = found.get("seconds") if isinstance(found, dict) else None
    known = isinstance(seconds, float) and 0 <= seconds < inf and found == {**record, "seconds": seconds}
    return seconds if known else None


@torch.no_grad()
def _deviation(model: nn.Module, images: Tensor) -> float:
    """Largest difference of the exported graph's outputs, relative to their root mean square, on one image and on several; NaN
    counts as infinite. Raises `UserError` if the model cannot be exported, or the graph cannot be run."""
    graph = to_onnx(model, images[:2])
    name_routed_nodes(graph, list(routed_layers(model)))
    lower_gated(graph)
    lower_routed_ffn(graph)
    graph.opset_imports.pop(DOMAIN, None)
    worst = 0.0
    with temporary_folder() as folder:
        ir.save(graph, folder / "trial.onnx", external_data="trial.data")
        with OnnxRunner(folder / "trial.onnx") as runner:
            for count in (1, len(images)):
                expected = model(images[:count]).float()
                given = torch.from_numpy(runner.run(images[:count].numpy())[0])
                if given.shape != expected.shape:
                    return float("inf")
                size = float(expected.square().mean().sqrt())
                off = float((given - expected).abs().max()) / max(size, torch.finfo(torch.float32).tiny)
                worst = off if off >= worst else worst if off == off else float("inf")
    return worst


def _key(spec: ModelSpec, model: nn.Module, ffns: Sequence[FFN], shape: Shape) -> str:
    """Hash of all that decides whether an architecture can be exported: its parts and their sources, arguments, image size, the
    exporter and the libraries under it. Weights are no part of it."""
    content = {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "spec": spec.model_dump(mode="json", exclude=OTHER),
        "parts": repr(model),
        "tensors": {name: [str(tensor.dtype), *tensor.shape] for name, tensor in model.state_dict().items()},
        "layers": [[ffn.name, type(ffn).__name__, ffn.activation, ffn.channels_first] for ffn in ffns],
        "shape": shape,
        "sources": sorted(hashlib.sha256(source.read_bytes()).hexdigest() for source in _sources(model)),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sources(model: nn.Module) -> set[Path]:
    """The files that define the classes of the model's modules, all of `moee` and `exporter`, and the operator's contract."""
    files = {Path(str(contract.__file__))}
    for own in (errors, manifests):  # files of the two packages' top folders
        files |= set(Path(str(own.__file__)).parent.rglob("*.py"))
    for kind in {type(module) for module in model.modules()}:
        try:
            files.add(Path(str(inspect.getsourcefile(kind))))
        except (OSError, TypeError):  # of a class without a file its name and arguments must do
            continue
    return {file for file in files if file.is_file()}
