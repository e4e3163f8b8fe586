"""ONNX export: one traced graph with `MoeeFfn` nodes, and the portable form that a pass makes of it. A layer of one expert is a
plain MLP in both, gated or not.

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
from typing import Any, cast

import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.serde import SerdeError
from pydantic import ValidationError
from torch import nn
from torch.onnx import OnnxExporterError

from exporter.belonging import BELONGS_TO, source_ids
from exporter.forms.registry import form_of
from exporter.graph.fused_attention import TRANSLATIONS as ATTENTION_TRANSLATIONS
from exporter.graph.operator_schema import VERSION, register
from exporter.manifests import input_body
from exporter.passes.attention import rewrite_attention
from exporter.passes.clear import Form, lower_clear_ffn
from exporter.passes.gated import lower_gated
from exporter.passes.name_routes import name_routed_nodes
from exporter.passes.plain import lower_single_experts
from exporter.passes.portable import lower_routed_ffn
from exporter.precision import INT8, dtype_of, refuse_overflow, typed
from exporter.quantization import CALIBRATION_IMAGES, Quantization, calibrate, quantized
from exporter.quantization.ops import TRANSLATIONS as INT8_TRANSLATIONS
from exporter.runners import OnnxRunner
from moee.artifacts.model import MoeeModel
from moee.data.image_set import ImageSet, say_read
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.measure.metrics import tokens_per_image
from moee.models.model import Shape
from moee.places.placement import OutputFolder, source_paths
from moee.progress import Reporter, silent
from moee.schema import reason_of, shown
from moee.store.artifact import write_manifest
from moee.store.result_kinds import EXPORT
from plugins.contract import DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION

OPSET = 20
OPSETS = {torch.bfloat16: 22}  # the first in which Conv takes bfloat16
INPUT, OUTPUT = "input", "output"
SCHEMA = "moee.export/1"
MANIFEST = "export.json"
DENSE, PORTABLE, TENSORRT = "dense.onnx", "portable.onnx", "tensorrt.onnx"
MOEE_DATA, DENSE_DATA = "moee.data", "dense.data"
REFERENCE, REFERENCE_DATA = "reference.onnx", "reference.data"  # of int8: the dense model as it was, for accuracy
TRACED = "traced.onnx"  # what both graphs are lowered from; removed before the export is done
CLEAR_TENSORRT: Form = "masked"  # no plugin: plain products with a mask (docs/method.md)

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


def _clear_ffn(
    x, router, router_bias, router_hidden, router_hidden_bias, up_in, up_out, up_bias, down_in, down_out, down_bias,
    ranks, activation: str,
):  # fmt: skip
    return _moee.ClearFfn(
        x, router, router_bias, router_hidden, router_hidden_bias, up_in, up_out, up_bias, down_in, down_out, down_bias,
        ranks=list(ranks), activation=activation,
    )  # fmt: skip


def _gated_ffn(x, w_gate, b_gate, w_up, b_up, w_down, b_out, activation: str):
    return _moee.GatedFfn(x, w_gate, b_gate, w_up, b_up, w_down, b_out, activation=activation)


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


def to_onnx(model: nn.Module, example: Shape | torch.Tensor) -> ir.Model:
    """Trace `model` on images of a shape, or on inputs like a tensor, with a dynamic first dimension; routed layers become
    `moee::MoeeFfn`, `moee::ClearFfn` or `moee::GatedFfn` nodes.

    Every node is named after the module that it came from (`blocks.0.mlp.fc1/node_linear_2`), as profiles and viewers show it.
    Raises `UserError` with the reason for a model that PyTorch's exporter cannot express.
    """
    import moee.layers.clear_ops
    import moee.layers.ops  # noqa: F401  registers the operators

    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.moee.ffn.default: _routed_ffn,
        torch.ops.moee.clear_ffn.default: _clear_ffn,
        torch.ops.moee.gated_ffn.default: _gated_ffn,
        **ATTENTION_TRANSLATIONS,
        **INT8_TRANSLATIONS,
    }
    with _quiet(), explained(), _frozen(model):
        given = example if isinstance(example, torch.Tensor) else torch.zeros(2, *example)
        program = torch.onnx.export(
            model.eval(), (given,), dynamo=True, opset_version=_opset(model), verbose=False,
            input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            custom_translation_table=table,
        )  # fmt: skip
    assert program is not None, "torch.onnx.export with dynamo=True returns a program"
    _forget_shapes()
    graph = program.model
    for node in graph.graph:
        scope = _scope(node)
        node.name = f"{scope}/{node.name}" if scope else node.name
        node.metadata_props.clear()  # the tracer's stack traces, which name paths of this machine
        for value in node.outputs:
            value.metadata_props.clear()
    rewrite_attention(graph)
    graph.opset_imports.setdefault(DOMAIN, VERSION)
    for shape in (graph.graph.inputs[0].shape, graph.graph.outputs[0].shape):
        if shape is not None:
            shape[0] = ir.SymbolicDim("batch")
    return graph


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Nothing needs a gradient meanwhile. A learned mask of attention that does (BEiT's positions) makes torch trace another
    attention than it runs, whose output lies otherwise in memory: the reshape after it then fails. And where the model itself
    switches gradients off, torch would trace that as a graph within the graph, whose nodes belong to no module."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        with torch.no_grad():
            yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


@contextmanager
def explained() -> Iterator[None]:
    """Errors of PyTorch's exporter, and of reading and writing its graphs, as a `UserError` that gives the first cause: what
    they raise is about themselves."""
    try:
        yield
    except SerdeError as error:
        reason = _first_line(_root(error))
        raise UserError(f"the model's graph cannot be written as ONNX ({reason}); please report this with the model") from error
    except OnnxExporterError as error:
        reason = _first_line(_root(error))
        raise UserError(f"PyTorch's exporter cannot express this model in ONNX ({reason})") from error


def _root(error: BaseException) -> BaseException:
    """The first cause of an error; raised itself where it is the machine's fault and not the model's."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    if isinstance(first, (MemoryError, OSError, KeyboardInterrupt)):
        raise first from error
    return first


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return shown(lines[0].strip(), quoted=False) if lines else type(error).__name__


def _forget_shapes() -> None:
    """Empty the tracer's cache of operator results: it is kept for the process, holds symbols of this trace alone, and grew by
    about 1 MiB an export of two small graphs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    clear = getattr(FakeTensorMode, "cache_clear", None)  # not a public interface
    if clear is not None:
        clear()


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
    precision: str = "fp32", calibration: ImageSet | None = None, calibration_images: int = CALIBRATION_IMAGES,
) -> None:  # fmt: skip
    """Write `dense.onnx`, `tensorrt.onnx`, `portable.onnx`, their weights and `export.json` into folder `path`.

    `source`, the artifact that `moee` was loaded from, is recorded so that `verify` finds it again. `precision` is fp32, fp16
    or bf16, the type of all three graphs (see `exporter.precision`), or int8 or int8-fp32: then both models are
    calibrated on `calibration_images` images of `calibration` (default: training images of the data that the model was last
    made on), and `reference.onnx`, the dense model in float32, is written too. Raises `UserError` if `path` exists and `force`
    is off, if the model has no routed layer, for an unknown precision or data that cannot be read.
    """
    dtype = dtype_of(precision)
    layers = routed_layers(moee.model)
    if not layers:
        raise UserError("the model has no routed layer to export; run moee extract first")
    transform = model_transform(moee.model)
    output = OutputFolder(path, EXPORT, force, source_paths(source))
    output.check()
    made_from = source_ids(source)
    graphs = {"dense": DENSE, "portable": PORTABLE, "tensorrt": TENSORRT}
    dense, model, quantization = moee.dense().eval(), moee.model.eval(), {}
    reference = None
    if precision in INT8:
        given = calibration or _calibration_data(moee, report)
        quantization = {n: calibrate(m, given, dtype, calibration_images, report) for n, m in (("dense", dense), ("moee", model))}
        reference, graphs["reference"] = dense, REFERENCE
        dense, model = (quantized(m, quantization[n].input_scales, dtype) for n, m in (("dense", dense), ("moee", model)))
    for whose, candidate in (("the dense model", dense), ("the model with experts", model)):
        refuse_overflow(candidate, dtype, precision, whose)
    report("export", 0, 3)
    with output.write() as folder, explained():
        if reference is not None:
            ir.save(to_onnx(reference, transform.shape), folder / REFERENCE, external_data=REFERENCE_DATA)
        ir.save(to_onnx(typed(dense, dtype), transform.shape), folder / DENSE, external_data=DENSE_DATA)
        report("export", 1, 3)
        graph = to_onnx(typed(model, dtype), transform.shape)
        forms = portable_forms(moee, transform.shape)
        name_routed_nodes(graph, list(layers))
        plain = lower_single_experts(graph) + lower_gated(graph)
        traced = folder / TRACED
        ir.save(graph, traced, external_data=MOEE_DATA)
        tensorrt = ir.load(traced)
        lower_clear_ffn(tensorrt, CLEAR_TENSORRT)
        plugin_nodes = sum(node.domain == DOMAIN for node in tensorrt.graph)
        if not plugin_nodes:
            tensorrt.opset_imports.pop(DOMAIN, None)
        ir.save(tensorrt, folder / TENSORRT)
        report("export", 2, 3)
        portable = ir.load(traced)
        lowered = len(plain) + lower_clear_ffn(portable, forms) + lower_routed_ffn(portable)
        if lowered != len(layers):
            raise RuntimeError(f"{lowered} routed nodes exported for {len(layers)} routed layers; please report this")
        portable.opset_imports.pop(DOMAIN, None)
        ir.save(portable, folder / PORTABLE)
        traced.unlink()
        _refuse_unloadable(folder, precision)
        body = {
            "input": input_body(INPUT, transform),
            "output": {"name": OUTPUT},
            "opset": OPSETS.get(dtype, OPSET),
            "precision": precision,
            "model": moee.spec.model_dump(),
            "data": moee.data,
            "seed": moee.record.seed,
            "classes": list(moee.classes),
            "cost": _latest_cost(moee),
            "source": os.path.relpath(Path(source).resolve(), Path(path).resolve()) if source is not None else None,
            BELONGS_TO: made_from,
            "routed_layers": list(layers),
            "experts": {name: layer.num_experts for name, layer in layers.items()},
            "clear_forms": forms,
            "plugin_nodes": plugin_nodes,
            "graphs": graphs,
            "quantization": {name: q.model_dump() for name, q in quantization.items()} or None,
        }
        write_manifest(folder, MANIFEST, SCHEMA, body)
    report("export", 3, 3)


def _refuse_unloadable(folder: Path, precision: str) -> None:
    """Raise `UserError` for graphs that ONNX Runtime cannot load, before they take the place of others. On the CPU it has no
    kernels for bfloat16, whose graphs are run in another way."""
    for name in (DENSE, PORTABLE) if precision != "bf16" else ():
        try:
            with OnnxRunner(folder / name):
                pass
        except UserError as error:
            raise UserError(
                f"ONNX Runtime cannot load the exported {name} ({reason_of(error.__cause__ or error)}): it has no kernel for "
                "something that the model computes, such as the bfloat16 of an autocast in its forward; take that out"
            ) from error


def _calibration_data(moee: MoeeModel, report: Reporter) -> ImageSet:
    try:
        data = moee.record.images("train", report=report)
    except UserError as error:
        raise UserError(f"int8 needs calibration images: {error}; give them with --data") from error
    say_read(train=data)
    return data


def read_quantization(manifest: dict[str, Any], model: str) -> Quantization | None:
    """What `export.json` says of `model` (dense, moee); None for a graph without int8. Raises `UserError` if that is nonsense."""
    if manifest.get("precision") not in INT8:
        return None
    try:
        return Quantization.model_validate(manifest["quantization"][model])
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{MANIFEST} does not say how its int8 graphs are quantised; export again") from error


def portable_forms(moee: MoeeModel, shape: Shape) -> dict[str, Form]:
    """The portable form of each layer whose kind has several."""
    layers = {name: layer for name, layer in routed_layers(moee.model).items() if form_of(layer).several}
    if not layers:
        return {}
    tokens = tokens_per_image(moee.layout(), layers, shape)
    return {name: cast(Form, form_of(layer).portable(layer, tokens[name])) for name, layer in layers.items()}


def _latest_cost(moee: MoeeModel) -> dict[str, Any] | None:
    """MACs and parameters as the last command that changed the weights measured them."""
    stages = moee.info.get("stages", {})
    return (stages.get("tuned") or stages.get("extracted") or {}).get("cost")
