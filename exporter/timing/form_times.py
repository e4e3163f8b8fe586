"""Times the forms of a model's layers on this CPU, for `exporter.timing.form_table`.

Every MLP that differs in shape or in how many tokens it sees is timed dense, with a share of its neurons for all tokens, and with
experts of that share; attention dense and with narrower heads. Where tokens can merge, all of that with fewer tokens too, and the
merging.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporter.graph.trace import to_onnx
from exporter.passes.stored import drop_unused
from exporter.runners import OnnxRunner
from exporter.runners.operator_cache import operator_or_reason
from exporter.timing.ffn_bench import Residual, lowered
from exporter.timing.form_table import FEWER, Forms, FormTable, Line
from moee.errors import UserError
from moee.layers.routed import Experts, RoutedFFN
from moee.measure.metrics import tokens_per_image
from moee.methods.neurons.gated_pruning import narrower
from moee.mlps.attention import NarrowAttention, Widths, find_attentions, input_shapes, mean_key_map
from moee.mlps.find import find_ffns
from moee.mlps.gated import GatedMLP
from moee.mlps.sites import mlp_module
from moee.models.ffn import FFN
from moee.models.model import Shape
from moee.progress import Reporter, silent
from moee.store.scratch import temporary_folder
from moee.tokens.block import plain_blocks
from moee.tokens.merge import Merged, TokenMerge
from plugins.contract import DOMAIN, INPUT_NAMES, OP_TYPE

SHARES = (0.3, 0.6, 1.0)  # of a layer's neurons, or of a head's dimensions
MERGED = 0.06  # of the tokens, about what a block merges where half of the MACs are left; the time hardly goes with it
RUNS, WARM_UP = 15, 3
Key = TypeVar("Key", bound=Hashable)


def measure_forms(
    dense: nn.Module, shape: Shape, batch: int, *, experts: Sequence[int] = (4, 8, 32), threads: int | None = None,
    report: Reporter = silent,
) -> FormTable:  # fmt: skip
    """Time the forms of every MLP and attention of `dense` on images of `shape`; layers of one shape are timed once."""
    ffns = {f.name: f for f in find_ffns(dense, shape=shape, gated=True).ffns}
    tokens = tokens_per_image(dense, list(ffns), shape)
    try:
        found = find_attentions(dense)
    except UserError:
        found = {}
    seen = input_shapes(dense, found, shape)
    shares = (1.0, FEWER) if _mergeable(dense) else (1.0,)
    jobs: dict[str, tuple[Hashable, Callable[[], list[Forms]]]] = {}
    for name, ffn in ffns.items():
        counts = [max(1, round(tokens[name] * share)) for share in shares]
        kind: Hashable = ("mlp", ffn.dim, ffn.hidden, ffn.activation, ffn.gated, *counts)
        jobs[name] = kind, partial(_mlp_forms, dense, ffn, [batch * count for count in counts], experts, threads)
    for name, attention in found.items():
        images, count = seen[name]
        counts = [max(1, round(count * share)) for share in shares]
        kind = ("attention", attention.qkv.in_features, attention.num_heads, attention.head_dim, images, *counts)
        jobs[name] = kind, partial(_attention_forms, attention, batch * images, counts, threads)
    total = len({kind for kind, _ in jobs.values()})
    operator_or_reason(report)
    report("forms of layers", 0, total)
    known: dict[Hashable, list[Forms]] = {}
    for kind, timed in jobs.values():
        if kind not in known:
            known[kind] = timed()
            report("forms of layers", len(known), total)
    forms = {name: known[kind] for name, (kind, _) in jobs.items()}
    return FormTable(
        batch, {n: f.hidden for n, f in ffns.items()}, {n: float(batch * tokens[n] * f.macs) for n, f in ffns.items()},
        {name: forms[name][0] for name in ffns}, {name: forms[name][0] for name in found},
        tokens | {name: count for name, (_, count) in seen.items()},
        {name: of[1] for name, of in forms.items() if len(shares) > 1},
        _merge_line(dense, next(iter(seen.values())), batch, threads) if len(shares) > 1 else {},
    )  # fmt: skip


def _mergeable(dense: nn.Module) -> bool:
    try:
        plain_blocks(dense)
    except UserError:
        return False
    return True


def _attention_forms(attention: Any, rows: int, counts: Sequence[int], threads: int | None) -> list[Forms]:
    """At each number of tokens, which its graphs are of."""
    dim, full = attention.qkv.in_features, attention.head_dim

    def narrowed(share: float) -> nn.Module:
        width = max(1, round(full * share))
        return NarrowAttention(dim, attention.num_heads, full, Widths(width, width))

    inputs = [torch.randn(rows, count, dim) for count in counts]
    return [_forms(copy.deepcopy(attention), {1: narrowed}, [x], threads)[0] for x in inputs]


def _merge_line(dense: nn.Module, seen: tuple[int, int], batch: int, threads: int | None) -> Line:
    """Milliseconds of the merge of the first block, for all of its tokens and for `FEWER` of them."""
    images, tokens = seen
    block, prefix = plain_blocks(dense)[0], int(dense.num_prefix_tokens)  # type: ignore[arg-type]
    weight, bias = mean_key_map(block.attn)  # type: ignore[arg-type]
    line = {}
    for share in (FEWER, 1.0):
        count = max(prefix + 2, round(tokens * share))
        merged = max(1, min(round(MERGED * tokens), (count - prefix) // 2))
        x = torch.randn(batch * images, count, weight.shape[1], generator=torch.Generator().manual_seed(0))
        (times,) = _times({1: _Merging(weight, bias, merged, prefix), 0: _Shorter(merged)}, [x], threads, {})
        line[share] = max(0.0, times[1] - times[0])
    return line


class _Merging(nn.Module):
    """The merge of a block on tokens [B, N, D] that stand for several of the image's each, as in the middle of a model."""

    def __init__(self, weight: Tensor, bias: Tensor, merged: int, prefix: int):
        super().__init__()
        self.merge = TokenMerge(weight, bias, merged, prefix)

    def forward(self, x: Tensor) -> Tensor:
        size = x[..., 0].abs() + 1
        done = self.merge(x, Merged(x, size))
        assert done.size is not None, "merged tokens have sizes"
        return done.x + done.size[..., None]


class _Shorter(nn.Module):
    """As many tokens fewer, without a choice: what the graph around a merge costs."""

    def __init__(self, merged: int):
        super().__init__()
        self.merged = merged

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, self.merged :]
        return y + (y[..., 0].abs() + 1)[..., None]


def _mlp_forms(
    dense: nn.Module, ffn: FFN, counts: Sequence[int], experts: Sequence[int], threads: int | None
) -> list[Forms]:  # fmt: skip
    """At each number of tokens of the batch, in eights, by the same graphs."""
    generator = torch.Generator().manual_seed(0)
    eights = min(counts) >= 8
    inputs = [torch.randn(*((n // 8, 8) if eights else (n, 1)), ffn.dim, generator=generator) for n in counts]
    whole = mlp_module(dense, ffn.name, ffn.bypassed)
    original = _OnTokens(whole) if ffn.channels_first else whole

    def made(number: int) -> Callable[[float], nn.Module]:
        return lambda share: _cut(ffn, share, number, generator)

    numbers = (1,) if ffn.gated else (1, *experts)
    return _forms(original, {n: made(n) for n in numbers}, inputs, threads, routed=not ffn.gated)


def _cut(ffn: FFN, share: float, experts: int, generator: torch.Generator) -> nn.Module:
    """An MLP that keeps `share` of its neurons in each of so many experts, drawn at random; tokens spread evenly over them."""
    width = max(1, round(share * ffn.hidden))
    chosen = [torch.randperm(ffn.hidden, generator=generator)[:width].sort().values for _ in range(experts)]
    if ffn.gated:
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


def _forms(
    original: nn.Module, made: Mapping[int, Callable[[float], nn.Module]], inputs: Sequence[Tensor], threads: int | None,
    routed: bool = False,
) -> list[Forms]:  # fmt: skip
    """Time a layer and what is `made` of it, by the number of experts and the share, on each of the inputs. What the sum of the
    residual costs is taken off. `routed`: all that is made is routed."""
    layers: dict[tuple[int, float], nn.Module] = {(0, 1.0): original, (-1, 1.0): nn.Identity()}
    layers |= {(count, share): make(share) for count, make in made.items() for share in SHARES}
    found = []
    ffns = {key: layer for key, layer in layers.items() if routed and key[0] > 0}
    for times in _times({key: Residual(layer.eval()) for key, layer in layers.items()}, inputs, threads, ffns):
        sum_ms = times.pop((-1, 1.0))
        net = {key: max(ms - sum_ms, 1e-6) for key, ms in times.items()}
        lines = {count: undisturbed({share: net[count, share] for share in SHARES}) for count in made}
        found.append(Forms(net[0, 1.0], lines.pop(1), lines))
    return found


def _times(
    modules: Mapping[Key, nn.Module], inputs: Sequence[Tensor], threads: int | None, ffns: Mapping[Key, nn.Module]
) -> list[dict[Key, float]]:  # fmt: skip
    """Median milliseconds of each on each input [rows, ...], all in turns, since a machine's speed changes. Inputs differ in
    their rows alone. `ffns`: the routed layers of those modules that differ by them alone."""
    traced: ir.Model | None = None  # of one, for all of them: tracing takes longer than timing
    with temporary_folder() as folder, ExitStack() as stack:
        runners = {}
        for number, (key, module) in enumerate(modules.items()):
            if key in ffns and traced is not None:
                graph = _with_weights_of(ffns[key], traced)
            else:
                graph = to_onnx(module.eval(), inputs[0][: min(2, len(inputs[0]))])
                if key in ffns:
                    traced = graph.clone()
            path = lowered(graph, folder / f"{number}.onnx")
            runners[key] = stack.enter_context(OnnxRunner(path, threads))
        return [_in_turns({key: runner.bound(x.numpy()) for key, runner in runners.items()}) for x in inputs]


def _with_weights_of(layer: nn.Module, traced: ir.Model) -> ir.Model:
    """The graph that was `traced` of another routed layer of the same width and activation, with this one's inputs."""
    model = traced.clone()
    (node,) = (node for node in model.graph if node.domain == DOMAIN and node.op_type == OP_TYPE)
    for at, part in enumerate(INPUT_NAMES[1:], 1):
        array = getattr(layer, part).detach().numpy()
        tensor = ir.tensor(array)
        value = ir.Value(name=f"of/{part}", shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        model.graph.register_initializer(value)
        node.replace_input_with(at, value)
    node.attributes["max_width"] = ir.AttrInt64("max_width", int(layer.max_width))  # type: ignore[arg-type]
    drop_unused(model)
    return model


def undisturbed(line: Line) -> Line:
    """No form costs more than a wider one of its kind: what was timed above that was disturbed by other work on the machine."""
    return {share: min(ms for wider, ms in line.items() if wider >= share) for share in line}


def _in_turns(calls: Mapping[Key, Callable[[], Any]]) -> dict[Key, float]:
    """Median milliseconds of each call, all in turns."""
    taken: dict[Key, list[float]] = {key: [] for key in calls}
    for turn in range(WARM_UP + RUNS):
        for key in calls if turn % 2 == 0 else reversed(list(calls)):
            started = time.perf_counter()
            calls[key]()
            taken[key].append(time.perf_counter() - started)
    return {key: 1e3 * float(np.median(values[WARM_UP:])) for key, values in taken.items()}
