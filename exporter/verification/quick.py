"""`moee verify --quick`: seconds instead of minutes, for every commit. It says what it did, and what it did not do.

A model, an export, engines or a bundle come in. Manifest and hashes are checked of each. Graphs are checked node by node
(`exporter.onnx_safety`, by the operator's contract too). A model runs on a random image. An export is compared with its model
as `moee verify` does, but on random images at the smallest batches, and without accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.engines.build import count_plugin_nodes, read_engines
from exporter.graph.export import PORTABLE, TENSORRT
from exporter.manifests import code_file, read_engine, read_export, refuse_lost_dense, refuse_module
from exporter.onnx_safety import check_onnx
from exporter.parity import ParityResult, check_parity
from exporter.runners import OnnxRunner
from exporter.ship.contents import graph_tensors
from exporter.ship.deployment import DEPLOYMENT_SCHEMA
from exporter.verification.result import VerifyResult
from moee.artifacts import checkpoint
from moee.artifacts.checkpoint import Word
from moee.artifacts.model import MoeeModel
from moee.data.image_set import TensorSet
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.interface.adapted import run_model
from moee.mlps.proof import random_images
from moee.models.model import Shape
from moee.store.artifact import read_manifest, sha256_file
from moee.store.result_kinds import DEPLOYMENT, ENGINE, EXPORT, MODEL, FolderKind, artifact_of, kind_of
from plugins.contract import OP_TYPE

SIZES = (1, 2)  # images a batch; torch's own error, which sets the tolerance, is the larger of the two
ACCURACY = "accuracy, and any image of yours"
CASES = "larger batches"


@dataclass(repr=False)
class QuickCheck:
    """What was found of the folder `path`, which is `what`. `done` are sentences, `not_done` what nobody checked, `failures` what
    is wrong. It is true where something was checked and nothing is wrong."""

    path: Path
    what: str
    done: list[str] = field(default_factory=list)
    not_done: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    parity: ParityResult | None = None

    @property
    def passed(self) -> bool:
        return bool(self.done) and not self.failures

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        """The verdict, as a notebook shows it, and each thing that is wrong, was checked or was not, a line each."""
        lines = [*(f"failed: {text}" for text in self.failures), *(f"checked: {text}" for text in self.done)]
        lines += [f"not checked: {text}" for text in self.not_done]
        return "\n".join([f"quick check of {self.what} {str(self.path)!r} {'passed' if self.passed else 'failed'}", *lines])


def quick_check(path: Path | str, model: Path | str | MoeeModel | None = None, word: Word | None = None) -> QuickCheck:
    """Check the artifact in the folder `path`, or the one whose file `path` is.

    `model`: what an export was made of, where its manifest does not lead there. `word`: as in `checkpoint.load`. Raises
    `UserError` for a damaged or foreign folder, and for an export whose model is not at hand: there is nothing to compare with.
    """
    folder, kind = artifact_at(path)
    result = QuickCheck(folder, kind.what)
    CHECKS[kind.manifest](result, model, word)
    return result


def artifact_at(path: Path | str) -> tuple[Path, FolderKind]:
    """The folder of an artifact and what it is, by itself or by a file that its manifest lists. Raises `UserError` where there is
    none that can be checked."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} not found; expected a folder that moee wrote, or a file in one")
    found = (path, kind_of(path)) if path.is_dir() else artifact_of(path) or (path, None)
    folder, kind = found
    if kind is None or kind.manifest not in CHECKS:
        raise UserError(f"{path} is no artifact that --quick checks; expected one with {', '.join(CHECKS)}, or its file")
    return folder, kind


def _check_model(result: QuickCheck, model: Any, word: Word | None) -> None:
    moee = checkpoint.load(result.path, word)
    result.done.append("manifest, hashes, shapes of the weights; no weight is NaN or infinite")
    images = _images(model_transform(moee.model).shape)
    with torch.inference_mode():
        output, _ = run_model(moee.model.eval(), images[:1])
    _finite(result, output.float().numpy(), "one random image through PyTorch")
    result.not_done += [ACCURACY, "the dense model beside it", "graphs: there are none in a model"]


def _check_export(result: QuickCheck, model: Any, word: Word | None) -> None:
    manifest = read_export(result.path)
    refuse_lost_dense(manifest, result.path)
    if not isinstance(model, MoeeModel):
        refuse_module(manifest, result.path, f"exporter.quick_check({str(result.path)!r}, RESULT) with what moee.load returned")
    result.done.append(f"manifest and hashes of {len(manifest['files'])} files")
    _check_graphs(result, result.path, sorted(manifest.get("graphs", {}).values()), manifest.get("plugin_nodes"))
    if isinstance(model, MoeeModel):
        moee = model
    else:
        source = Path(model) if model else result.path / manifest["source"] if manifest.get("source") else None
        if source is None:
            raise UserError(f"{result.path} does not say which model it was made from; give that with --model DIR")
        moee = checkpoint.load(source, word)
    shape = model_transform(moee.model).shape
    images = TensorSet("random images", _images(shape), [-1] * len(_images(shape)))
    result.parity = parity = check_parity(result.path, moee, images, sizes=SIZES)
    error, layers = parity.max_abs_error, len(parity.layers)
    result.done.append(
        f"parity with PyTorch on random images, batches {' and '.join(map(str, SIZES))}: largest error {error:.2e}; "
        f"{layers} layers alone, and their weights in {TENSORRT}"
    )
    cases = VerifyResult(result.path.name, parity, None, "not asked for", None, 0.0).cases()
    failed = [f"{case.group}, {case.name}: {case.failure}" for case in cases if case.failure]
    result.failures += failed or ([] if parity else ["parity failed; moee verify says where"])
    result.not_done += [ACCURACY, CASES, "engines"]


def _check_bundle(result: QuickCheck, model: Any, word: Word | None) -> None:
    manifest = read_manifest(result.path, DEPLOYMENT.manifest, DEPLOYMENT_SCHEMA)
    result.done.append(f"manifest and hashes of {len(manifest['files'])} files")
    graphs = sorted(name for name in manifest["files"] if name.startswith("models/") and name.endswith(".onnx"))
    for_cpu = manifest.get("sm") is None
    _check_graphs(result, result.path, graphs, None if for_cpu else manifest.get("plugin_nodes"))
    if for_cpu:
        portable = result.path / "models" / PORTABLE
        given, _ = graph_tensors(portable)
        channels, height, width = given.shape
        with OnnxRunner(portable) as runner:
            output = runner.run(_images((channels, height, width))[:1].numpy().astype(given.type))[0]
        _finite(result, output, f"one random image through {PORTABLE}")
    result.not_done += ["parity: a bundle holds no PyTorch model, so check the export that it was made from", ACCURACY]


def _check_engines(result: QuickCheck, model: Any, word: Word | None) -> None:
    read_engines(result.path)
    manifest = read_engine(result.path)
    named = [*manifest["engines"].values(), manifest["plugin"]]
    files = [(item["file"], item["sha256"]) for item in named if item["file"]]
    for name, digest in files:
        path = code_file(result.path, name)
        if not path.is_file() or sha256_file(path) != digest:
            raise UserError(f"{path} is not the file that {ENGINE.manifest} names; build again")
    result.done.append(f"manifest and hashes of {len(files)} engines and libraries")
    result.not_done.append("the engines themselves: they are code, and run on their GPU alone")


CHECKS: dict[str, Callable[[QuickCheck, Any, Word | None], None]] = {
    MODEL.manifest: _check_model, EXPORT.manifest: _check_export, DEPLOYMENT.manifest: _check_bundle,
    ENGINE.manifest: _check_engines,
}  # fmt: skip


def _check_graphs(result: QuickCheck, folder: Path, names: list[str], plugin_nodes: int | None) -> None:
    """Every node, tensor and operator of the graphs; the number of the plugin's nodes is the manifest's."""
    if not names:
        raise UserError(f"{folder} lists no graphs, so there is nothing to check; export again")
    for name in names:
        check_onnx(folder / name)
    done = f"{len(names)} graphs by the rules of ONNX"
    tensorrt = next((name for name in names if Path(name).name == TENSORRT), None)
    if tensorrt is not None:
        found = count_plugin_nodes(folder / tensorrt)
        done += f"; {found} {OP_TYPE} nodes in {TENSORRT} by the operator's contract"
        if plugin_nodes not in (None, found):
            result.failures.append(f"{TENSORRT} has {found} {OP_TYPE} nodes, the manifest says {plugin_nodes}")
    result.done.append(done)


def _images(shape: Shape) -> torch.Tensor:
    """Random images [2, C, H, W], the same in every run."""
    return random_images(shape, torch.zeros(()))[: max(SIZES)]


def _finite(result: QuickCheck, output: np.ndarray, what: str) -> None:
    if output.size and np.isfinite(output).all():
        result.done.append(f"{what}: {output.shape[-1]} finite numbers")
    else:
        result.failures.append(f"{what}: the output is not finite")
