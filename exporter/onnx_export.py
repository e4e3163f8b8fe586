"""ONNX export: one traced graph with `MoeeFfn` nodes, and the portable form that a pass makes of it.

`dense.onnx` has a weight file of its own; `tensorrt.onnx` and `portable.onnx` share `moee.data`.
"""

from __future__ import annotations

import ast
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from torch import nn

from exporter.operator_schema import VERSION, register
from exporter.passes.name_routes import name_routed_nodes
from exporter.passes.portable import lower_routed_ffn
from exporter.precision import dtype_of, typed
from moee.artifact import atomic_folder, write_manifest
from moee.checkpoint import MoeeModel
from moee.data import model_transform
from moee.errors import UserError
from moee.layer import RoutedFFN, routed_layers
from moee.progress import Reporter, silent
from plugins.contract import DOMAIN, OP_TYPE, PLUGIN_NAMESPACE, PLUGIN_VERSION

OPSET = 20
OPSETS = {torch.bfloat16: 22}  # the first in which Conv takes bfloat16
INPUT, OUTPUT = "input", "output"
SCHEMA = "moee.export/1"
MANIFEST = "export.json"
DENSE, PORTABLE, TENSORRT = "dense.onnx", "portable.onnx", "tensorrt.onnx"
MOEE_DATA, DENSE_DATA = "moee.data", "dense.data"

register()
_moee = onnxscript.values.Opset(DOMAIN, VERSION)


def _routed_ffn(
    x, router, router_bias, w_up, b_up, w_down, b_out, neurons, offsets,
    activation: str, top_k: int, max_width: int, load,
):  # fmt: skip
    attributes: dict[str, Any] = {"load": list(load)} if len(load) else {}
    return _moee.MoeeFfn(
        x, router, router_bias, w_up, b_up, w_down, b_out, neurons, offsets, activation=activation, top_k=top_k,
        max_width=max_width, plugin_version=PLUGIN_VERSION, plugin_namespace=PLUGIN_NAMESPACE, **attributes,
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter and onnxscript log and warn about themselves; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def to_onnx(model: nn.Module, size: int) -> ir.Model:
    """Trace `model` on [batch, 3, size, size] with a dynamic batch; routed layers become `moee::MoeeFfn` nodes.

    Every node is named after the module that it came from (`blocks.0.mlp.fc1/node_linear_2`), as profiles and viewers show it.
    """
    import moee.ops  # noqa: F401  registers torch.ops.moee.ffn

    table: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.moee.ffn.default: _routed_ffn}
    with _quiet():
        program = torch.onnx.export(
            model.eval(), (torch.zeros(2, 3, size, size),), dynamo=True, opset_version=_opset(model), verbose=False,
            input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            custom_translation_table=table,
        )  # fmt: skip
    assert program is not None, "torch.onnx.export with dynamo=True returns a program"
    graph = program.model
    for node in graph.graph:
        scope = _scope(node)
        node.name = f"{scope}/{node.name}" if scope else node.name
        node.metadata_props.clear()  # the tracer's stack traces, which name paths of this machine
        for value in node.outputs:
            value.metadata_props.clear()
    graph.opset_imports.setdefault(DOMAIN, VERSION)
    for shape in (graph.graph.inputs[0].shape, graph.graph.outputs[0].shape):
        if shape is not None:
            shape[0] = ir.SymbolicDim("batch")
    return graph


def _opset(model: nn.Module) -> int:
    return OPSETS.get(getattr(model, "dtype", torch.float32), OPSET)


def _scope(node: ir.Node) -> str:
    """Name of the module that a traced node belongs to, or nothing. The tracer writes them as a Python list."""
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    try:
        scopes = ast.literal_eval(text) if text else []
    except (SyntaxError, ValueError):
        return ""
    names = [s for s in scopes[:-1] if isinstance(s, str) and not s.startswith("_")]
    return names[-1].removeprefix("model.") if names and names[-1] != "model" else ""


def export(
    moee: MoeeModel, path: Path | str, force: bool = False, report: Reporter = silent, source: Path | str | None = None,
    precision: str = "fp32",
) -> None:  # fmt: skip
    """Write `dense.onnx`, `tensorrt.onnx`, `portable.onnx`, their weights and `export.json` into folder `path`.

    `source`, the artifact that `moee` was loaded from, is recorded so that `verify` finds it again. `precision` is fp32, fp16
    or bf16, the type of all three graphs (see `exporter.precision`). Raises `UserError` if `path` exists and `force` is off, if
    the model has no routed layer, or for an unknown precision.
    """
    dtype = dtype_of(precision)
    layers = routed_layers(moee.model)
    if not layers:
        raise UserError("the model has no routed layer to export; run moee extract first")
    other = next((name for name, layer in layers.items() if not isinstance(layer, RoutedFFN)), None)
    if dtype != torch.float32 and other is not None:
        raise UserError(f"`{other}` is a {type(layers[other]).__name__}, which exports in fp32 alone; leave out --precision")
    transform = model_transform(moee.model)
    report("export", 0, 3)
    with atomic_folder(path, force) as folder:
        ir.save(to_onnx(typed(moee.dense(), dtype), transform.size), folder / DENSE, external_data=DENSE_DATA)
        report("export", 1, 3)
        graph = to_onnx(typed(moee.model, dtype), transform.size)
        name_routed_nodes(graph, list(layers))
        ir.save(graph, folder / TENSORRT, external_data=MOEE_DATA)
        report("export", 2, 3)
        portable = ir.load(folder / TENSORRT)
        lowered = lower_routed_ffn(portable)
        if lowered != len(layers):
            raise RuntimeError(f"{lowered} {OP_TYPE} nodes exported for {len(layers)} routed layers; please report this")
        ir.save(portable, folder / PORTABLE)
        body = {
            "input": {"name": INPUT, "size": transform.size, "mean": transform.mean, "std": transform.std},
            "output": {"name": OUTPUT},
            "opset": OPSETS.get(dtype, OPSET),
            "precision": precision,
            "model": moee.spec.model_dump(),
            "data": moee.data,
            "cost": _latest_cost(moee),
            "source": os.path.relpath(Path(source).resolve(), Path(path).resolve()) if source is not None else None,
            "routed_layers": list(layers),
            "graphs": {"dense": DENSE, "portable": PORTABLE, "tensorrt": TENSORRT},
        }
        write_manifest(folder, MANIFEST, SCHEMA, body)
    report("export", 3, 3)


def _latest_cost(moee: MoeeModel) -> dict[str, Any] | None:
    """MACs and parameters as the last command that changed the weights measured them."""
    stages = moee.info.get("stages", {})
    return (stages.get("tuned") or stages.get("extracted") or {}).get("cost")
