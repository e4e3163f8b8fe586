"""Each routed layer alone against its dense MLP, in ONNX Runtime on the CPU, on the tokens that it really sees."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporter.graph.trace import to_onnx
from exporter.passes.gated import lower_gated
from exporter.passes.portable import lower_routed_ffn
from exporter.runners import OnnxRunner
from exporter.timing.latency import time_pairs
from moee.artifacts.model import MoeeModel
from moee.calibrate.calibration import as_tokens
from moee.data.image_set import ImageSet, batches
from moee.errors import UserError
from moee.interface.watch import watched
from moee.layers.routed import NeuronLayer, RoutedLayer, routed_layers
from moee.mlps.sites import mlp_module
from moee.progress import Reporter, silent
from moee.store.scratch import temporary_folder

ROWS = 8  # leading dimension of the input: as many images


@dataclass(frozen=True)
class FFNSpeed:
    """Milliseconds (p50) of one layer on `tokens` tokens, the median ratio of neighbouring runs, and the ideal one by MACs."""

    name: str
    tokens: int
    dense_ms: float
    moee_ms: float
    speedup: float
    ideal: float


class Residual(nn.Module):
    """x + ffn(x), as in a block: without the sum a reshape at the end of the graph would cost a copy that a model has not."""

    def __init__(self, ffn: nn.Module):
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


def ffn_speeds(
    moee: MoeeModel, data: ImageSet, tokens: int, runs: int = 40, threads: int | None = None, *, report: Reporter = silent
) -> list[FFNSpeed]:
    """Time every layer of neurons (`RoutedFFN`, `GatedFFN`) and its dense MLP in turn on at most `tokens` tokens of `data`, a
    multiple of eight.

    Raises `UserError` if the model has none, or the images give no eight tokens.
    """
    routed = {n: layer for n, layer in routed_layers(moee.model).items() if isinstance(layer, NeuronLayer)}
    layers = {n: layer for n, layer in routed.items() if not layer.channels_first}
    if not layers:
        raise UserError("the model has no routed MLP on [..., D]; extract one with --method moee or moefication")
    inputs = layer_inputs(moee.model, layers, data, tokens)
    dense, rows = moee.dense().eval(), []
    for done, (name, layer) in enumerate(layers.items()):
        report("layers", done, len(layers))
        rows.append(_speed(name, mlp_module(dense, name, layer.bypassed), layer, inputs[name], runs, threads))
    report("layers", len(layers), len(layers))
    return rows


def layer_inputs(model: nn.Module, layers: dict[str, NeuronLayer], data: ImageSet, tokens: int) -> dict[str, Tensor]:
    """The first `tokens` input tokens [tokens, D] of each layer."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    with watched(model, layers, lambda name, x: inputs[name].append(as_tokens(x.detach(), False))), torch.inference_mode():
        for batch in batches(data, 8):
            model(batch.images)
            if all(sum(map(len, parts)) >= tokens for parts in inputs.values()):
                break
    return {name: torch.cat(parts)[:tokens] for name, parts in inputs.items()}


def ideal_speedup(dense_macs_per_token: float, layer: RoutedLayer, x: Tensor) -> float:
    """Dense MACs over those of the layer, its router included, by the experts that `x` [..., D] takes."""
    counts = torch.bincount(layer.routes(x).flatten(), minlength=layer.num_experts)
    return dense_macs_per_token / layer.macs_per_token((counts / counts.sum()).tolist())


def _speed(name: str, dense: nn.Module, layer: NeuronLayer, tokens: Tensor, runs: int, threads: int | None) -> FFNSpeed:
    count = len(tokens) // ROWS * ROWS
    if not count:
        raise UserError(f"`{name}` sees {len(tokens)} tokens; expected at least {ROWS}, give more images")
    x = tokens[:count].reshape(ROWS, count // ROWS, -1).contiguous()
    with temporary_folder() as folder, ExitStack() as stack:
        runners = []
        for file, module in (("dense", dense), ("moee", layer)):
            graph = to_onnx(Residual(module), x[:2])
            lower_gated(graph)
            lower_routed_ffn(graph)
            ir.save(graph, folder / f"{file}.onnx")
            runners.append(stack.enter_context(OnnxRunner(folder / f"{file}.onnx", threads)))
        first, second = (lambda: runners[0].run(x.numpy())), (lambda: runners[1].run(x.numpy()))
        times = time_pairs((first, second), runs)
    weights = sum(p.numel() for p in dense.parameters() if p.dim() > 1)
    p50 = np.median(times, axis=1) * 1e3
    ratio = float(np.median(times[0] / times[1]))
    return FFNSpeed(name, count, float(p50[0]), float(p50[1]), ratio, ideal_speedup(weights, layer, x))


def overall(rows: list[FFNSpeed]) -> tuple[float, float]:
    """Speed-up and ideal speed-up of all layers together: sums of times, the ideal ones from the dense times."""
    dense = sum(r.dense_ms for r in rows)
    return dense / sum(r.moee_ms for r in rows), dense / sum(r.dense_ms / r.ideal for r in rows)
