"""Tracing a model into one graph: a routed layer becomes one node of this project's domain."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.serde import SerdeError
from torch import nn
from torch.onnx import OnnxExporterError

from exporter.graph.fused_attention import TRANSLATIONS as ATTENTION_TRANSLATIONS
from exporter.graph.operator_schema import VERSION, register
from exporter.graph.stable_sort import TRANSLATIONS as SORT_TRANSLATIONS
from exporter.passes.attention import rewrite_attention
from exporter.quantization.ops import TRANSLATIONS as INT8_TRANSLATIONS
from moee.errors import UserError
from moee.models.model import Shape
from moee.schema import shown
from plugins.contract import DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION

OPSET = 20
OPSETS = {torch.bfloat16: 22}  # the first in which Conv takes bfloat16
INPUT, OUTPUT = "input", "output"

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


def _low_rank_ffn(x, up_in, up_out, up_bias, down_in, down_out, down_bias, activation: str):
    return _moee.LowRankFfn(x, up_in, up_out, up_bias, down_in, down_out, down_bias, activation=activation)


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
    `moee::MoeeFfn`, `moee::ClearFfn`, `moee::GatedFfn` or `moee::LowRankFfn` nodes.

    Every node is named after the module that it came from (`blocks.0.mlp.fc1/node_linear_2`), as profiles and viewers show it.
    Raises `UserError` with the reason for a model that PyTorch's exporter cannot express.
    """
    import moee.layers.clear_ops
    import moee.layers.low_rank
    import moee.layers.ops  # noqa: F401  registers the operators

    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.moee.ffn.default: _routed_ffn,
        torch.ops.moee.clear_ffn.default: _clear_ffn,
        torch.ops.moee.gated_ffn.default: _gated_ffn,
        torch.ops.moee.low_rank_ffn.default: _low_rank_ffn,
        **ATTENTION_TRANSLATIONS,
        **SORT_TRANSLATIONS,
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
    _refuse_fixed(graph)
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


def _refuse_fixed(graph: ir.Model) -> None:
    """Raise `UserError` for a graph of one batch size: where a forward makes a plain number of it, torch falls back to that."""
    shape = graph.graph.inputs[0].shape
    if shape is not None and isinstance(shape[0], int):
        raise UserError(
            f"the model's graph holds for batches of {shape[0]} images alone: its forward makes a number of the batch size, as "
            "len(x) and int(x.shape[0]) do; take x.shape[0] there"
        )


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
