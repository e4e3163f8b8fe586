"""Each routed layer alone against its dense MLP, in ONNX Runtime on the CPU, on the tokens that it really sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporter.graph.trace import to_onnx
from exporter.passes.gated import lower_gated
from exporter.passes.plain import lower_single_experts
from exporter.passes.portable import lower_routed_ffn
from exporter.runners import OnnxRunner
from exporter.runners.operator_cache import operator_or_reason
from exporter.timing.latency import time_in_turns
from exporter.verdict import Verdict, judge
from moee.artifacts.model import MoeeModel
from moee.calibrate.calibration import as_tokens
from moee.data.image_set import ImageSet, batches
from moee.errors import UserError
from moee.interface.watch import watched
from moee.layers.routed import NeuronLayer, RoutedLayer, routed_layers
from moee.mlps.sites import mlp_module
from moee.progress import Reporter, silent
from moee.store.scratch import temporary_folder
from plugins.contract import CPU_ACTIVATIONS, OP_TYPE

ROWS = 8  # leading dimension of the input: as many images
NO_LAYER = "the model has no routed MLP on [..., D]; extract one with --method moee or moefication"


@dataclass(frozen=True)
class FFNSpeed:
    """One layer of the model `model` (its place among those that were timed) on `tokens` tokens: seconds of its dense MLP and of
    itself in every round [N], and the ideal speed-up by MACs."""

    model: int
    name: str
    tokens: int
    dense_s: np.ndarray
    ours_s: np.ndarray
    ideal: float

    @property
    def dense_ms(self) -> float:
        return float(np.median(self.dense_s)) * 1e3

    @property
    def verdict(self) -> Verdict:
        return judge(self.dense_s, self.ours_s)


@dataclass(frozen=True)
class LayersReached:
    """All layers of the model `name` together at one batch size: their speed-up over the dense MLPs, and the ideal one."""

    name: str
    batch: int
    tokens: int
    verdict: Verdict
    ideal: float


class Residual(nn.Module):
    """x + ffn(x), as in a block: without the sum a reshape at the end of the graph would cost a copy that a model has not."""

    def __init__(self, ffn: nn.Module):
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


def ffn_speeds(
    models: Sequence[MoeeModel], data: ImageSet, tokens: int, runs: int = 40, threads: int | None = None, *,
    report: Reporter = silent,
) -> list[FFNSpeed]:  # fmt: skip
    """Time every layer of neurons (`RoutedFFN`, `GatedFFN`) that all `models` have and its dense MLP in turns, on at most
    `tokens` tokens of `data`, a multiple of eight. The models are cut from one dense model; the first gives the dense MLPs.
    Layers of several experts run as the operator of ONNX Runtime where its library can be compiled.

    Raises `UserError` if there is no such layer, or the images give no eight tokens.
    """
    layers = [_on_tokens(moee) for moee in models]
    names = [name for name in layers[0] if all(name in other for other in layers)]
    if not names:
        raise UserError(NO_LAYER)
    inputs = [layer_inputs(m.model, {n: own[n] for n in names}, data, tokens) for m, own in zip(models, layers, strict=True)]
    dense, rows = models[0].dense().eval(), []
    for done, name in enumerate(names):
        report("layers", done, len(names))
        mlp = mlp_module(dense, name, layers[0][name].bypassed)
        rows += _speeds(name, mlp, [own[name] for own in layers], [x[name] for x in inputs], runs, threads)
    report("layers", len(names), len(names))
    return rows


def _on_tokens(moee: MoeeModel) -> dict[str, NeuronLayer]:
    routed = {n: layer for n, layer in routed_layers(moee.model).items() if isinstance(layer, NeuronLayer)}
    return {n: layer for n, layer in routed.items() if not layer.channels_first}


def layers_side_by_side(
    models: Mapping[str, MoeeModel], data: ImageSet, batches_of: Sequence[int], runs: int = 40, threads: int | None = None, *,
    report: Reporter = silent,
) -> list[LayersReached]:  # fmt: skip
    """All layers of each of `models` together, by name, at several batch sizes; as `ffn_speeds` times them."""
    given, found = list(models.values()), []
    tokens = image_tokens(given[0], data)
    for batch in batches_of:
        rows = ffn_speeds(given, data, batch * tokens, runs, threads, report=report)
        for i, name in enumerate(models):
            own = [row for row in rows if row.model == i]
            found.append(LayersReached(name, batch, own[0].tokens, *overall(own)))
    return found


def image_tokens(moee: MoeeModel, data: ImageSet) -> int:
    """Tokens of an image of `data` in the layer that sees most of them. Raises `UserError` for a model without MLPs."""
    counts: list[int] = []
    with watched(moee.model, _on_tokens(moee), lambda name, x: counts.append(x.numel() // x.shape[-1])), torch.inference_mode():
        moee.model(next(batches(data, 1)).images)
    if not counts:
        raise UserError(NO_LAYER)
    return max(counts)


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


def _speeds(
    name: str, dense: nn.Module, layers: Sequence[NeuronLayer], tokens: Sequence[Tensor], runs: int, threads: int | None
) -> list[FFNSpeed]:
    count = min(map(len, tokens)) // ROWS * ROWS
    if not count:
        raise UserError(f"`{name}` sees {min(map(len, tokens))} tokens; expected at least {ROWS}, give more images")
    given = [t[:count].reshape(ROWS, count // ROWS, -1).contiguous() for t in tokens]
    with temporary_folder() as folder, ExitStack() as stack:
        calls = []
        for i, (module, x) in enumerate(zip([dense, *layers], [given[0], *given], strict=True)):
            path = lowered(to_onnx(Residual(module.eval()), x[:2]), folder / f"{i}.onnx")
            calls.append(stack.enter_context(OnnxRunner(path, threads)).bound(x.numpy()))
        times = time_in_turns(calls, runs)
    weights = sum(p.numel() for p in dense.parameters() if p.dim() > 1)
    return [
        FFNSpeed(i, name, count, times[0], times[i + 1], ideal_speedup(weights, layer, x))
        for i, (layer, x) in enumerate(zip(layers, given, strict=True))
    ]


def lowered(graph: ir.Model, path: Path) -> Path:
    """A traced layer as ONNX Runtime on the CPU runs it, written to `path`."""
    lower_single_experts(graph)
    lower_gated(graph)
    used = {node.attributes["activation"].as_string() for node in graph.graph if node.op_type == OP_TYPE}
    if not used <= set(CPU_ACTIVATIONS) or operator_or_reason()[0] is None:
        lower_routed_ffn(graph)
    ir.save(graph, path)
    return path


def overall(rows: Sequence[FFNSpeed]) -> tuple[Verdict, float]:
    """Speed-up and ideal speed-up of all layers of one model together: sums of times round by round, the ideal ones from the
    dense times."""
    dense = sum(r.dense_ms for r in rows)
    sums = judge(np.sum([r.dense_s for r in rows], axis=0), np.sum([r.ours_s for r in rows], axis=0))
    return sums, dense / sum(r.dense_ms / r.ideal for r in rows)
