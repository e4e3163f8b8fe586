"""Layers of an export for the self-test: what the plugin computes on the device, with tokens that the model's own images give."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporter.graph.export import PORTABLE, TENSORRT
from exporter.manifests import exported_model, image_record
from exporter.onnx_safety import load_ir
from exporter.parity.taps import tapped_graph, taps_of
from exporter.precision import PRECISIONS
from exporter.runners import OnnxRunner
from exporter.ship.contents import Contents
from moee.artifacts.checkpoint import Word
from moee.data.image_set import batches
from moee.errors import UserError
from plugins.contract import ACTIVATIONS, DOMAIN, DTYPES, INPUT_NAMES, OP_TYPE
from plugins.library.cases import FLOAT_INPUTS, LayerCase

log = logging.getLogger("moee")

LAYERS = 3  # the first, the middle and the last
IMAGES = 2
MOST_TOKENS = 512  # of a layer: what the answers in float64 take on disk


def layer_cases(export_dir: Path, contents: Contents, word: Word | None = None) -> list[LayerCase]:
    """Three layers that run in the plugin, with tokens of images that the model was calibrated on; none for an export without
    such layers.

    Where these images cannot be read, the tokens are of noise, and the cases' names say so. `word` as in `exported_model`.
    """
    graph = load_ir(export_dir / TENSORRT)
    nodes = [node for node in graph.graph if node.domain == DOMAIN and node.op_type == OP_TYPE]
    if not nodes:
        return []
    nodes = [nodes[i] for i in sorted({0, len(nodes) // 2, len(nodes) - 1})][:LAYERS]
    names = [str(node.name) for node in nodes]
    model, _ = exported_model(contents.export, export_dir, word)
    images, read = _images(export_dir, contents, word)
    widen = contents.export.get("precision") == "bf16"
    with tapped_graph(export_dir / PORTABLE, names, widen) as path, OnnxRunner(path) as runner:
        kind = np.float32 if widen else np.dtype(contents.given.type)
        taps = taps_of(runner.run(images.numpy().astype(kind)), names)
    cases = []
    for node, name in zip(nodes, names, strict=True):
        tokens = taps[name].tokens.float()
        case = _case(node, tokens, contents.export)
        per_image, dense = max(1, len(tokens) // len(images)), _dense_width(model, name, tokens.shape[1])
        cases.append(replace(case, name=name if read else f"{name} (noise)", per_image=per_image, dense_width=dense))
    return cases


def _images(export_dir: Path, contents: Contents, word: Word | None) -> tuple[Tensor, bool]:
    """Images [N, C, H, W], prepared, and whether they are the model's own."""
    try:
        data = image_record(contents.export, export_dir, word).images("train")
        return next(batches(data, IMAGES)).images, True
    except UserError as error:
        log.warning("the self-test's tokens are of noise, since the model's images cannot be read (%s)", error)
        return torch.randn(IMAGES, *contents.given.shape, generator=torch.Generator().manual_seed(0)), False


def _case(node: ir.Node, tokens: Tensor, export: dict[str, Any]) -> LayerCase:
    inputs = {"x": tokens[:MOST_TOKENS]}
    for part, value in zip(INPUT_NAMES[1:], node.inputs[1:], strict=True):
        assert value is not None and value.const_value is not None, "check_onnx wants initialisers"
        stored = value.const_value.numpy()
        inputs[part] = torch.from_numpy(np.array(stored, np.float32 if part in (*FLOAT_INPUTS, "router_bias") else np.int32))
    own = str(PRECISIONS.get(str(export.get("precision")), torch.float16)).removeprefix("torch.")
    fits = all(bool(inputs[part].to(torch.float16).isfinite().all()) for part in FLOAT_INPUTS)
    types = DTYPES if fits else tuple(t for t in DTYPES if t != "float16")
    timed = tuple(t for t in DTYPES if t in types and t in ("float16", own))
    attributes = node.attributes
    activation = attributes["activation"].as_string() if "activation" in attributes else ACTIVATIONS[0]
    top_k = attributes["top_k"].as_int() if "top_k" in attributes else 1
    return LayerCase(
        name=str(node.name), inputs=inputs, activation=ACTIVATIONS.index(activation), top_k=top_k, types=types, timed=timed,
        is_layer=True,
    )  # fmt: skip


def _dense_width(model: nn.Module, name: str, dim: int) -> int | None:
    """Neurons of the dense MLP called `name`; None where the model has no module of this name with linear layers."""
    try:
        linears = [m for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear) and m.in_features == dim]
    except AttributeError:
        return None
    return max((linear.out_features for linear in linears), default=None)
