"""What each form of a model's layers costs on this CPU: a table over tokens and widths, measured once, and what it predicts.

Every MLP that differs in shape or in how many tokens it sees is timed dense, with a share of its neurons for all tokens, and with
experts of that share; attention dense and with narrower heads. A layer's time lies between the measured ones of its width, on a
straight line. A model's is the dense model's, less the dense layers that it replaces, plus what replaces them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

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
from exporter.timing.ffn_bench import Residual
from moee.errors import OutOfReach, UserError
from moee.layers.routed import Experts, RoutedFFN, RoutedLayer, routed_layers
from moee.measure.metrics import tokens_per_image
from moee.methods.neurons.gated_pruning import narrower
from moee.mlps.attention import NarrowAttention, Widths, find_attentions, input_shapes, narrow_attentions
from moee.mlps.find import find_ffns
from moee.mlps.gated import GatedMLP
from moee.mlps.sites import mlp_module
from moee.models.ffn import FFN
from moee.models.model import Shape
from moee.planning.forms import LayerChoices
from moee.progress import Reporter, silent
from moee.store.scratch import temporary_folder
from moee.tokens.block import merged_tokens

SHARES = (0.3, 0.6, 1.0)  # of a layer's neurons, or of a head's dimensions
RUNS, WARM_UP = 15, 3
ALIKE = 1.15  # times of a MAC that differ by less are within the noise
LEAST = 0.1  # of the mean time of a MAC: a layer whose time hardly grows with its width was disturbed, or waits for memory
Line = Mapping[float, float]  # milliseconds by share


@dataclass(frozen=True)
class Forms:
    """Milliseconds of the forms of a layer on its tokens of a batch. `static`: with a share of the neurons (or of a head's
    dimensions); `experts`: by their number, of tokens that each take that share."""

    dense: float
    static: Line
    experts: Mapping[int, Line] = field(default_factory=dict)

    @property
    def whole(self) -> float:
        """Of all neurons: the dense layer, or the static form with everything kept, which computes the same. It is the longer of
        the two: a timing that was disturbed must not end the search, whose result is timed as a whole."""
        return max(self.dense, self.static.get(1.0, 0.0))

    def of(self, share: float, experts: int = 1) -> float:
        """Of a layer whose tokens take `share` of it, with so many `experts`; of a number between measured ones, the nearest."""
        if experts <= 1 or not self.experts:
            return between(self.static, share)
        return between(self.experts[min(self.experts, key=lambda known: (abs(known - experts), known))], share)


def between(line: Line, share: float) -> float:
    """The value at `share` on the straight lines through the measured ones, which go on beyond them; never below zero."""
    shares = sorted(line)
    at = min(max(1, int(np.searchsorted(shares, share))), len(shares) - 1)
    low, high = shares[at - 1], shares[at]
    return max(0.0, line[low] + (line[high] - line[low]) * (share - low) / (high - low))


@dataclass(frozen=True)
class FormTable:
    """The forms of every MLP and attention by name, for `batch` images; of each MLP its neurons (`hidden`) and the MACs of the
    dense one on these images; of all of them their `tokens` an image in the dense model."""

    batch: int
    hidden: Mapping[str, int]
    macs: Mapping[str, float]
    mlps: Mapping[str, Forms]
    attentions: Mapping[str, Forms]
    tokens: Mapping[str, int] = field(default_factory=dict)

    def predict(self, model: nn.Module, dense_ms: float) -> float:
        """Milliseconds of a batch of `model`, which was cut from the one that the table is of and that takes `dense_ms`."""
        total = dense_ms
        routed, narrowed, merged = routed_layers(model), narrow_attentions(model), merged_tokens(model)
        for name, forms in self.mlps.items():
            ours = forms.dense
            if (layer := routed.get(name)) is not None:
                ours = forms.of(_share(layer, self.hidden[name]), layer.num_experts)
            total += ours * self._left(name, merged, 1) - forms.dense
        for name, forms in self.attentions.items():
            ours = forms.dense
            if (attention := narrowed.get(name)) is not None:
                ours = forms.of((attention.widths.qk + attention.widths.v) / (2 * attention.head_dim))
            total += ours * self._left(name, merged, 0) - forms.dense
        return total

    def _left(self, name: str, merged: Sequence[int], after: int) -> float:
        """The share of its tokens that a layer in block i still gets, where `merged[i]` merge in each; the time is taken to go
        with it. `after`: 1 for what lies behind the block's own merge."""
        if not merged:
            return 1.0
        block = int(name.split(".")[1])  # merging blocks are those of timm's VisionTransformer: blocks.i
        return 1 - sum(merged[: block + after]) / self.tokens[name]

    def choices(self, share: float, experts: int) -> LayerChoices:
        """As `moee.planning.forms.LayerForms.choices`."""
        as_experts, always = [], []
        for name, forms in self.mlps.items():
            if forms.of(share) >= forms.whole:
                always.append(name)
            elif experts > 1 and forms.of(share, experts) >= forms.whole:
                as_experts.append(name)
        if len(always) == len(self.mlps):
            raise OutOfReach(f"no MLP is faster than dense here with {share:.0%} of its neurons")
        counts = {name: 1 if name in as_experts else experts for name in self.mlps if name not in always}
        return LayerChoices(one_expert=as_experts, exclude=always, mac_times=self._mac_times(share, counts))

    def _mac_times(self, share: float, experts: Mapping[str, int]) -> dict[str, float]:
        """What a MAC more takes in each MLP around `share` of its neurons, with so many experts, relative to the mean over all
        their MACs; none where all are alike within `ALIKE`."""
        low, high = share * 0.6, share * 1.4
        more = {n: max(0.0, self.mlps[n].of(high, e) - self.mlps[n].of(low, e)) for n, e in experts.items()}
        mean = sum(more.values()) / sum((high - low) * self.macs[n] for n in more)
        if mean <= 0:
            return {}
        times = {n: float(f"{max(LEAST, ms / ((high - low) * self.macs[n] * mean)):.2g}") for n, ms in more.items()}
        return times if max(times.values()) > ALIKE * min(times.values()) else {}

    def to_json(self) -> dict[str, Any]:
        def body(forms: Forms) -> dict[str, Any]:
            lines = {str(count): {f"{s:g}": round(ms, 5) for s, ms in line.items()} for count, line in forms.experts.items()}
            return {"dense": forms.dense, "static": {f"{s:g}": round(ms, 5) for s, ms in forms.static.items()}, "experts": lines}

        return {
            "batch": self.batch, "mlps": {name: body(forms) for name, forms in self.mlps.items()},
            "attentions": {name: body(forms) for name, forms in self.attentions.items()},
        }  # fmt: skip


def _share(layer: RoutedLayer, hidden: int) -> float:
    """The share of the `hidden` neurons that a token takes, by the load that the layer was made for."""
    widths = torch.tensor(layer.widths, dtype=torch.float64)
    load = torch.tensor(getattr(layer, "load", ()) or [1] * len(widths), dtype=torch.float64)
    return layer.top_k * float(widths @ load / load.sum()) / hidden


def measure_forms(
    dense: nn.Module, shape: Shape, batch: int, *, experts: Sequence[int] = (4, 8, 32), threads: int | None = None,
    report: Reporter = silent,
) -> FormTable:  # fmt: skip
    """Time the forms of every MLP and attention of `dense` on images of `shape`; layers of one shape are timed once."""
    ffns = find_ffns(dense, shape=shape, gated=True).ffns
    tokens = tokens_per_image(dense, [f.name for f in ffns], shape)
    known: dict[tuple[Any, ...], Forms] = {}
    mlps, attentions = {}, {}
    try:
        found = find_attentions(dense)
    except UserError:
        found = {}
    seen = input_shapes(dense, found, shape)
    kinds: dict[str, tuple[Any, ...]] = {
        f.name: ("mlp", f.dim, f.hidden, f.activation, f.only_static, tokens[f.name]) for f in ffns
    }
    kinds |= {n: ("attention", a.qkv.in_features, a.num_heads, a.head_dim, *seen[n]) for n, a in found.items()}
    operator_or_reason(report)
    report("forms of layers", 0, len(set(kinds.values())))
    for ffn in ffns:
        kind = kinds[ffn.name]
        if kind not in known:
            known[kind] = _mlp_forms(dense, ffn, batch * tokens[ffn.name], experts, threads)
            report("forms of layers", len(known), len(set(kinds.values())))
        mlps[ffn.name] = known[kind]
    for name, attention in found.items():
        kind = kinds[name]
        if kind not in known:
            images, count = seen[name]
            x = torch.randn(batch * images, count, attention.qkv.in_features)
            full = attention.head_dim

            def narrowed(share: float, attention: Any = attention, full: int = full) -> nn.Module:
                width = max(1, round(full * share))
                return NarrowAttention(attention.qkv.in_features, attention.num_heads, full, Widths(width, width))

            known[kind] = _forms(copy.deepcopy(attention), {1: narrowed}, x, threads)
            report("forms of layers", len(known), len(set(kinds.values())))
        attentions[name] = known[kind]
    hidden, macs = {f.name: f.hidden for f in ffns}, {f.name: float(batch * tokens[f.name] * f.macs) for f in ffns}
    return FormTable(batch, hidden, macs, mlps, attentions, tokens | {name: count for name, (_, count) in seen.items()})


def _mlp_forms(dense: nn.Module, ffn: FFN, tokens: int, experts: Sequence[int], threads: int | None) -> Forms:
    generator = torch.Generator().manual_seed(0)
    count = tokens // 8 * 8 or tokens
    rows = 8 if count % 8 == 0 else 1
    x = torch.randn(rows, count // rows, ffn.dim, generator=generator)
    whole = mlp_module(dense, ffn.name, ffn.bypassed)
    original = _OnTokens(whole) if ffn.channels_first else whole

    def made(number: int) -> Callable[[float], nn.Module]:
        return lambda share: _cut(ffn, share, number, generator)

    return _forms(original, {n: made(n) for n in (1, *(() if ffn.only_static else experts))}, x, threads)


def _cut(ffn: FFN, share: float, experts: int, generator: torch.Generator) -> nn.Module:
    """An MLP that keeps `share` of its neurons in each of so many experts, drawn at random; tokens spread evenly over them."""
    width = max(1, round(share * ffn.hidden))
    chosen = [torch.randperm(ffn.hidden, generator=generator)[:width].sort().values for _ in range(experts)]
    if ffn.only_static:
        return narrower(cast(GatedMLP, ffn), chosen[0])
    union = torch.cat(chosen).unique()
    position = torch.zeros(ffn.hidden, dtype=torch.int64)
    position[union] = torch.arange(len(union))
    router = nn.functional.normalize(torch.randn(experts, ffn.dim, generator=generator), dim=1)
    return RoutedFFN(
        Experts(
            router=router, router_bias=torch.zeros(experts), w_up=ffn.w_up[union], b_up=ffn.b_up[union],
            w_down=ffn.w_down.T[union], b_out=ffn.b_down.expand(experts, -1),
            neurons=torch.cat([position[n] for n in chosen]).to(torch.int32),
            offsets=torch.arange(0, experts * width + 1, width).to(torch.int32), activation=ffn.activation,
        )  # fmt: skip
    )


class _OnTokens(nn.Module):
    """A 1x1-convolution MLP on [B, D, H, W] as one on tokens [B, N, D]: what ONNX Runtime computes is the same product."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x.movedim(-1, 1)[..., None])
        return y[..., 0].movedim(1, -1)


def _forms(original: nn.Module, made: Mapping[int, Callable[[float], nn.Module]], x: Tensor, threads: int | None) -> Forms:
    """Time a layer and what is `made` of it, by the number of experts and the share; all in turns, since a machine's speed
    changes. What the sum of the residual costs is taken off."""
    graphs: dict[tuple[int, float], nn.Module] = {(0, 1.0): original, (-1, 1.0): nn.Identity()}
    graphs |= {(count, share): make(share) for count, make in made.items() for share in SHARES}
    with temporary_folder() as folder, ExitStack() as stack:
        calls = {}
        for number, (key, module) in enumerate(graphs.items()):
            runner = stack.enter_context(OnnxRunner(_written(module, x, folder / f"{number}.onnx"), threads))
            calls[key] = runner.bound(x.numpy())
        times = _in_turns(calls)
    sum_ms = times.pop((-1, 1.0))
    net = {key: max(ms - sum_ms, 1e-6) for key, ms in times.items()}
    lines = {count: undisturbed({share: net[count, share] for share in SHARES}) for count in made}
    return Forms(net[0, 1.0], lines.pop(1), lines)


def undisturbed(line: Line) -> Line:
    """No form costs more than a wider one of its kind: what was timed above that was disturbed by other work on the machine."""
    return {share: min(ms for wider, ms in line.items() if wider >= share) for share in line}


def _written(module: nn.Module, x: Tensor, path: Path) -> Path:
    graph = to_onnx(Residual(module.eval()), x[: min(2, len(x))])
    lower_single_experts(graph)
    lower_gated(graph)
    if operator_or_reason()[0] is None:
        lower_routed_ffn(graph)
    ir.save(graph, path)
    return path


def _in_turns(calls: Mapping[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Median milliseconds of each call, all in turns."""
    taken: dict[Any, list[float]] = {key: [] for key in calls}
    for turn in range(WARM_UP + RUNS):
        for key in calls if turn % 2 == 0 else reversed(list(calls)):
            started = time.perf_counter()
            calls[key]()
            taken[key].append(time.perf_counter() - started)
    return {key: 1e3 * float(np.median(values[WARM_UP:])) for key, values in taken.items()}
