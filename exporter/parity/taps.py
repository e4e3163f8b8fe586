"""What goes into and comes out of every routed layer: extra outputs of a graph, hooks on a torch model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from exporter.onnx_safety import load_ir
from exporter.passes.gated import READERS
from exporter.passes.plain import FIRST
from exporter.passes.tape import Tape
from exporter.passes.widen import widen_bfloat16
from moee.errors import UserError
from moee.layers.routed import RoutedLayer, routed_layers
from moee.schema import reason_of
from moee.store.scratch import temporary_folder

ONNX_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
PARTS = ("tokens", "route", "result")


@dataclass(frozen=True)
class Tap:
    """One layer in one run: `tokens` [T, D], `route` [T, k] int64, `result` [T, D]."""

    tokens: Tensor
    route: Tensor
    result: Tensor


@contextmanager
def tapped_graph(graph: Path, layers: list[str], widen: bool = False) -> Iterator[Path]:
    """A temporary copy of a portable graph that also outputs tokens, routes and result of every layer, in that order.

    With `widen`, bfloat16 becomes float32. Raises `UserError` if the graph lacks one of these values.
    """
    model = load_ir(graph)
    for layer in layers:
        model.graph.outputs.extend(standard_taps(model, graph, layer))
    with copied(model, graph, widen) as path:
        yield path


def standard_taps(model: ir.Model, graph: Path, layer: str) -> list[ir.Value]:
    """Tokens, routes and result of a layer of standard operators in `model`, loaded from `graph`. Raises `UserError` without
    them."""
    values = {v.name: v for node in model.graph for v in node.outputs}
    first = _first(values, layer)
    return _parts(values, graph, layer) if first is None else _plain(model, values, first, layer)


def _parts(values: dict[str | None, ir.Value], graph: Path, layer: str) -> list[ir.Value]:
    for part in PARTS:
        if f"{layer}/{part}" not in values:
            raise UserError(
                f"{graph} has no value {layer}/{part}: it was made from another model or by an older version; export it again"
            )
    return [values[f"{layer}/{part}"] for part in PARTS]


def _first(values: dict[str | None, ir.Value], layer: str) -> ir.Node | None:
    """The node that reads the tokens of a plain layer (see `passes.plain`); None for a layer that routes."""
    value = values.get(f"{layer}/{FIRST}")
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "MatMul" or f"{layer}/result" not in values or f"{layer}/route" in values:
        return None
    return node if _width(node) else None


def _width(node: ir.Node) -> int:
    """Rows of a product's weight; 0 if they are not known."""
    weight = node.inputs[1] if len(node.inputs) == 2 else None
    rows = weight.shape[0] if weight is not None and weight.shape is not None and len(weight.shape) == 2 else 0
    return rows if isinstance(rows, int) else 0


def _plain(model: ir.Model, values: dict[str | None, ir.Value], first: ir.Node, layer: str) -> list[ir.Value]:
    """Tokens, routes and result of a layer of one expert; nodes that say that every token's is expert 0 are added."""
    tape = Tape(model.graph, first, layer)
    numbers = {name: tape.constant(np.array(v, np.int64), name) for name, v in (("zero", [0]), ("one", [1]))}
    shape = tape.constant(np.array([-1, _width(first)], np.int64), "token_shape")
    tokens = tape.op("Reshape", [first.inputs[0], shape], name="tokens")[0]
    count = tape.op("Slice", [tape.op("Shape", [tokens])[0], numbers["zero"], numbers["one"]])[0]
    route = tape.op("Expand", [numbers["zero"], count], name="route")[0]
    source = first.inputs[0]
    if source is not None:
        tokens.type = source.type
    route.type = ir.TensorType(ir.DataType.INT64)
    return [tokens, route, values[f"{layer}/result"]]


@contextmanager
def probe_graph(graph: Path, layers: list[str], precision: str, widen: bool = False) -> Iterator[Path]:
    """A temporary graph of the routed layers alone, with tokens and routes as inputs, so that every expert can be reached.

    Inputs are `<layer>/probe_tokens` [N, D] float32 and `<layer>/probe_route` [N * k] int64 of every layer; outputs, a pair a
    layer, are its result [N, D] and the routes [N * k] that its own router wanted.
    """
    model = load_ir(graph)
    values = {v.name: v for node in model.graph for v in node.outputs}
    results = []
    for layer in layers:
        feed = ir.Value(name=f"{layer}/probe_tokens", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, None]))
        chosen = ir.Value(name=f"{layer}/probe_route", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([None]))
        model.graph.inputs.extend([feed, chosen])
        source = feed
        if precision != "fp32":
            cast = ir.Node("", "Cast", [feed], [ir.AttrInt64("to", int(ONNX_TYPES[precision]))], name=f"{layer}/probe_cast")
            cast.outputs[0].name = f"{layer}/probe_typed"
            model.graph.insert_before(model.graph[0], cast)
            source = cast.outputs[0]
        first = _first(values, layer)
        if first is not None:  # its input may have other readers, and the dictated routes have none
            tokens = first.inputs[0]
            for place in READERS:  # a gated MLP has two products that read the tokens
                reader = values[f"{layer}/{place}"].producer() if f"{layer}/{place}" in values else None
                if reader is not None and reader.inputs[0] is tokens:
                    reader.replace_input_with(0, source)
            _, route, result = _plain(model, values, first, layer)
        else:
            inputs, route, result = _parts(values, graph, layer)
            ir.convenience.replace_all_uses_with(inputs, source)
            ir.convenience.replace_all_uses_with(route, chosen)
        results += [result, route]
    model.graph.outputs.clear()
    model.graph.outputs.extend(results)
    model.graph.inputs.pop(0)
    RemoveUnusedNodesPass()(model)
    with copied(model, graph, widen) as path:
        yield path


@contextmanager
def copied(model: ir.Model, graph: Path, widen: bool = False) -> Iterator[Path]:
    """`model`, loaded from `graph`, in a temporary folder with copies of the weight files that it reads.

    Links will not do: ONNX Runtime refuses symbolic ones, and other readers of the export a file that has a second hard link.
    """
    if widen:
        widen_bfloat16(model)
    with temporary_folder() as folder:
        stored = [v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
        for name in {str(tensor.location) for tensor in stored}:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(graph.parent / name, target)
        try:
            ir.save(model, folder / graph.name)
        except Exception as error:  # onnx_ir finds only now what it cannot write
            reason = reason_of(error)
            raise UserError(f"{graph} cannot be taken apart ({reason}); export it again") from error
        yield folder / graph.name


def taps_of(outputs: list[np.ndarray], layers: list[str]) -> dict[str, Tap]:
    """Taps from the outputs of a tapped graph: the model's, then tokens, routes and result of each layer."""
    taps = {}
    for i, layer in enumerate(layers):
        tokens, route, result = (torch.from_numpy(np.ascontiguousarray(a)) for a in outputs[1 + 3 * i : 4 + 3 * i])
        taps[layer] = Tap(tokens, route.reshape(len(tokens), -1), result.reshape(tokens.shape))
    return taps


@contextmanager
def hooked(model: nn.Module) -> Iterator[dict[str, Tap]]:
    """A dictionary that holds the taps of the model's latest forward pass."""
    taps: dict[str, Tap] = {}

    def hook(name: str):
        def record(module: RoutedLayer, args: tuple[Tensor, ...], y: Tensor) -> None:
            x = args[0]
            route = module.routes(x)
            x, y = (t.movedim(1, -1) if module.channels_first else t for t in (x, y))
            taps[name] = Tap(x.reshape(-1, x.shape[-1]), route, y.reshape(-1, y.shape[-1]))

        return record

    handles = [layer.register_forward_hook(hook(name)) for name, layer in routed_layers(model).items()]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()
