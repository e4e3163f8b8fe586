"""How much the model's output minds each neuron of each expert: variance weighted by the gradient, token by token.

Dropping neuron j on token t, with its mean m put in its place, changes the MLP's output by (m - a_tj) w2_j. To second order the
model's output error is then E_r[((a_tj - m) g_t . w2_j)^2], where g_t is the gradient of a random projection r of the output
with respect to the MLP's output at t. One backward pass over calibration images gives it for every token, layer and neuron
at once, in the units of the model's own output error, so that layers and experts can be compared.

The Fisher-weighted saliency of structured pruning (Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher
pruning"; Molchanov et al. 2019), taken per expert and around the expert's mean.

HEAPr (Li et al. 2025, arXiv 2509.22299) takes the two factors apart: E[a^2] w2' G w2 with G = E[g g'] over the expert's tokens,
which is E[a^2] E[(g . w2)^2]. `factored` gives that; it is the product of the means where the rest here is the mean of the
product.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moee.calibrate.calibration import CHUNK, as_tokens, hidden_activations
from moee.calibrate.image_budget import image_groups, likeness, spread, tokens_an_image
from moee.data.image_set import Batch, ImageSet, batches, listed_batches
from moee.errors import UserError, chosen
from moee.interface.adapted import run_model, title_of_model
from moee.layers.routing import route
from moee.models.ffn import FFN, channels_last
from moee.parallel.devices import placed
from moee.parallel.group import SOLO, Group, Parcel
from moee.parallel.ordered import OrderedSum, cut
from moee.progress import Reporter, silent, track
from moee.space.limits import USUAL, Limits

SHRINKAGE = 16.0  # tokens' worth of the layer's average that an expert's own figures are blended with
EARLY = 8  # times the tokens of a backward pass, of layers that only the forward pass goes through


@dataclass(frozen=True)
class RoutedStats:
    """A layer's router [K, D], bias [K] and the mean activation [K, H] of each expert."""

    router: Tensor
    bias: Tensor
    mean: Tensor

    def to(self, device: torch.device) -> RoutedStats:
        return RoutedStats(self.router.to(device), self.bias.to(device), self.mean.to(device))


class Sensitivity(NamedTuple):
    """Of a layer: the mean over tokens `error` [K, H] that dropping each neuron of each expert makes, and the `metric` [D, D] of
    errors of its output, the second moment of the gradients there, up to a factor. Both float64."""

    error: Tensor
    metric: Tensor


class _Accumulator:
    """Sums (a - m)^2 (g . w2)^2 over tokens, per expert and neuron, and g g', for one layer and one objective after the other.
    `factored`: (a - m)^2 and (g . w2)^2 are summed apart."""

    def __init__(self, ffn: FFN, stats: RoutedStats, objectives: int, factored: bool = False):
        self.ffn, self.stats, self.factored = ffn, stats, factored
        device = stats.mean.device
        self.sums = [torch.zeros(stats.mean.shape, dtype=torch.float64, device=device) for _ in range(objectives)]
        self.squares = torch.zeros(stats.mean.shape if factored else 0, dtype=torch.float64, device=device)
        square = (ffn.w_down.shape[0], ffn.w_down.shape[0])
        self.metrics = [torch.zeros(square, dtype=torch.float64, device=device) for _ in range(objectives)]
        self.count = torch.zeros(len(stats.router), dtype=torch.float64, device=device)
        self.images = 0
        self.deviation: list[Tensor] = []
        self.routes: Tensor = torch.empty(0)

    def see(self, x: Tensor) -> None:
        """Keep a batch's squared deviations from the expert's mean until its gradients arrive."""
        tokens = as_tokens(x, self.ffn.channels_first)
        self.routes = route(tokens, self.stats.router, self.stats.bias)[:, 0]
        self.count += torch.bincount(self.routes, minlength=len(self.count))
        mean = self.stats.mean.float()
        self.deviation = [
            (hidden_activations(self.ffn, part) - mean[e]).square_()
            for part, e in zip(tokens.split(CHUNK), self.routes.split(CHUNK), strict=True)
        ]
        if self.factored:
            for deviation, experts in zip(self.deviation, self.routes.split(CHUNK), strict=True):
                self._sum_up(self.squares, deviation, experts)

    @staticmethod
    def _sum_up(total: Tensor, rows: Tensor, experts: Tensor) -> None:
        """Add rows [n, H] to the sums [K, H] of their experts [n]."""
        for e in experts.unique().tolist():
            total[e] += rows[experts == e].sum(0, dtype=torch.float64)

    def error(self, objective: int) -> Tensor:
        """Errors [K, H] summed over the tokens of each expert."""
        if not self.factored:
            return self.sums[objective]
        return self.sums[objective] * self.squares / self.count.clamp(min=1)[:, None]

    def take(self) -> dict[str, Tensor]:
        """What was summed since the last time, by the layer's name."""
        taken = {f"{self.ffn.name} {i}": total.clone() for i, total in enumerate(self.sums)}
        taken |= {f"{self.ffn.name} metric {i}": metric.clone() for i, metric in enumerate(self.metrics)}
        taken |= {f"{self.ffn.name} count": self.count.clone(), f"{self.ffn.name} images": torch.tensor(self.images)}
        taken[f"{self.ffn.name} squares"] = self.squares.clone()
        for total in (*self.sums, *self.metrics, self.count, self.squares):
            total.zero_()
        self.images = 0
        return taken

    def put(self, whole: Mapping[str, Tensor]) -> None:
        """The sums of all parts, as `take` names them."""
        for i, total in enumerate(self.sums):
            total.copy_(whole[f"{self.ffn.name} {i}"])
        for i, metric in enumerate(self.metrics):
            metric.copy_(whole[f"{self.ffn.name} metric {i}"])
        self.count.copy_(whole[f"{self.ffn.name} count"])
        self.squares.copy_(whole[f"{self.ffn.name} squares"])
        self.images = int(whole[f"{self.ffn.name} images"])

    def add(self, gradient: Tensor, objective: int) -> None:
        tokens = as_tokens(gradient, self.ffn.channels_first)
        self.metrics[objective] += (tokens.T @ tokens).double()
        parts = zip(tokens.split(CHUNK), self.routes.split(CHUNK), self.deviation, strict=True)
        for part, experts, deviation in parts:
            effect = (part @ self.ffn.w_down).square_()
            self._sum_up(self.sums[objective], effect if self.factored else deviation * effect, experts)


def output_projection(output: Tensor, classifier: bool, generator: torch.Generator) -> Tensor:
    """Random vectors v like `output` [B, C] whose mean outer product is the metric of the output's error: that of the KL
    divergence (diag p - p p', or p (1 - p) of a single logit) for logits, that of one minus cosine for features."""
    noise = torch.randn(output.shape, generator=generator).to(output.device)
    if classifier and output.shape[1] == 1:
        yes = torch.sigmoid(output)
        return noise * (yes * (1 - yes)).sqrt()
    if classifier:
        root = torch.softmax(output, -1).sqrt()
        return root * noise - root.square() * (root * noise).sum(-1, keepdim=True)
    unit = nn.functional.normalize(output, dim=-1)
    return (noise - unit * (noise * unit).sum(-1, keepdim=True)) / output.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def measure_sensitivity(
    model: nn.Module, ffns: Mapping[str, FFN], stats: Mapping[str, RoutedStats], data: ImageSet, tokens: int,
    *, objective: str = "both", factored: bool = False, seed: int = 0, report: Reporter = silent, group: Group = SOLO,
    limits: Limits = USUAL,
) -> dict[str, Sensitivity]:  # fmt: skip
    """Sensitivity of each layer's experts and neurons, over about `tokens` tokens of each layer.

    `objective`: `output` (what the model returns), `tokens` (every token of the last feature map) or `both`: each scaled to a
    total of one over the whole model, then averaged. `factored`: HEAPr's product of means. Experts that few tokens reach lean on
    their layer's average. The model's weights are not changed. Everything comes and goes on the CPU; the work is done on the
    device of `group`, whose ranks share the images and get the same figures.
    """
    device = group.device
    near = {name: each.to(device) for name, each in stats.items()}
    with placed(model, device):
        moved = {name: ffns[name].to(device) for name in stats}
        return _measure(model, moved, near, data, tokens, objective, factored, seed, report, group, limits)


def _measure(
    model: nn.Module, ffns: Mapping[str, FFN], stats: Mapping[str, RoutedStats], data: ImageSet, tokens: int, objective: str,
    factored: bool, seed: int, report: Reporter, group: Group, limits: Limits,
) -> dict[str, Sensitivity]:  # fmt: skip
    device = group.device
    model.eval()
    kinds = chosen({"output": ["output"], "tokens": ["tokens"], "both": ["output", "tokens"]}, objective, "objective")
    last = "tokens" in kinds
    classifier = bool(getattr(model, "num_classes", 0))
    layers = {name: _Accumulator(ffns[name], stats[name], len(kinds), factored) for name in stats}
    frozen = {p: p.requires_grad for p in model.parameters()}
    for p in frozen:
        p.requires_grad_(False)
    current = 0

    def before(layer: _Accumulator):
        return lambda module, args: layer.see(args[0].detach())

    def after(layer: _Accumulator):
        def on_forward(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            y = y if y.requires_grad else y.detach().requires_grad_()
            y.register_hook(lambda gradient: layer.add(gradient, current))
            return y

        return on_forward

    def see(batch: Batch, generator: torch.Generator) -> None:
        nonlocal current
        output, features = run_model(model, batch.images.to(device))
        both = last and isinstance(features, Tensor) and features.dim() > 2
        if objective == "tokens" and not both:
            title = title_of_model(model)
            raise UserError(f"--objective tokens needs a model with one feature map; {title} has none, use output")
        if both:
            features = channels_last(features, model)
        for position, kind in enumerate(kinds):
            if kind == "tokens" and not both:
                continue
            current = position  # read by the hooks
            keep = kind == "output" and both and len(kinds) > 1
            _backward(features if kind == "tokens" else output, kind, classifier, generator, keep)

    try:
        with group.agreed():
            first = next(batches(data, 1)).images.to(device)
            counts = tokens_an_image(model, {name: ffns[name].dim for name in layers}, first)
        for same in image_groups(counts, len(data), tokens, least=2, alike=likeness(model)):
            most = max(counts[name] for name in same.names)
            size = max(1, min(limits.backward // most, EARLY * limits.backward // max(counts.values())))
            sums, shared = OrderedSum(group), _Shared(spread(len(data), same.images), size, group)
            what = "sensitivity" if same.names[0] == next(iter(counts)) else f"sensitivity from {same.names[0]}"
            with group.agreed(), torch.enable_grad(), ExitStack() as stack:
                for name in same.names:
                    module, output = model.get_submodule(name), model.get_submodule(ffns[name].output_name)
                    stack.callback(module.register_forward_pre_hook(before(layers[name])).remove)
                    stack.callback(output.register_forward_hook(after(layers[name])).remove)
                own = track(listed_batches(data, shared.lists, strict=group.alone), what, len(shared.lists), report)
                for _, part in groupby(own, key=shared.part):
                    for batch in part:
                        # what is drawn for a batch depends on its place among all of them, not on who sees it
                        see(batch, torch.Generator().manual_seed(seed + (shared.number(batch) << 32)))
                        for name in same.names:
                            layers[name].images += len(batch.images)
                    sums.add({key: value for name in same.names for key, value in layers[name].take().items()})
            whole = sums.total()
            if group.leader and whole:
                for name in same.names:
                    layers[name].put(whole)
    finally:
        for p, flag in frozen.items():
            p.requires_grad_(flag)
    with group.agreed():
        found = _combine(layers, len(kinds)) if group.leader else {}
    told = group.broadcast(Parcel(None, {f"{n} {field}": t for n, s in found.items() for field, t in s._asdict().items()}))
    return {name: Sensitivity(told.tensors[f"{name} error"], told.tensors[f"{name} metric"]) for name in layers}


class _Shared:
    """Batches of a data set's positions `order`, `size` each; `lists` are this rank's, whole parts of all."""

    def __init__(self, order: Tensor, size: int, group: Group):
        lists = [some.tolist() for some in order.split(size)]
        parts = cut(len(lists))
        share = group.part(len(parts))
        self.lists = [lists[number] for part in parts[share.start : share.stop] for number in part]
        self._numbers = {position: number for number, some in enumerate(lists) for position in some}
        self._parts = {number: part for part, run in enumerate(parts) for number in run}

    def number(self, batch: Batch) -> int:
        """The batch's place among those of all ranks."""
        return self._numbers[int(batch.indices[0])]

    def part(self, batch: Batch) -> int:
        return self._parts[self.number(batch)]


def _backward(value: Tensor, kind: str, classifier: bool, generator: torch.Generator, keep: bool) -> None:
    if kind == "output":
        (value * output_projection(value.detach(), classifier, generator)).sum().backward(retain_graph=keep)
        return
    flat = value.flatten(1, -2)  # a projection of each token, averaged over an image's tokens
    vector = output_projection(flat.detach(), False, generator)
    ((flat * vector).sum() / flat.shape[1] ** 0.5).backward()


def _combine(layers: Mapping[str, _Accumulator], objectives: int) -> dict[str, Sensitivity]:
    if not all(layer.images for layer in layers.values()):
        raise UserError("none of the images that the sensitivity is measured on can be read; check the files")
    most = max(layer.images for layer in layers.values())  # layers saw different numbers of images: totals are for as many
    totals = [sum(float(layer.error(i).sum()) * (most / layer.images) for layer in layers.values()) for i in range(objectives)]
    used = [i for i, total in enumerate(totals) if total > 0] or [0]
    result = {}
    for name, layer in layers.items():
        total = sum(layer.error(i) / max(totals[i], 1e-300) for i in used) / len(used)
        average = total.sum(0) / layer.count.sum().clamp(min=1)  # type: ignore[union-attr]
        error = (total + SHRINKAGE * average) / (layer.count + SHRINKAGE)[:, None]
        metric = torch.stack([layer.metrics[i] / max(totals[i], 1e-300) for i in used]).sum(0)
        result[name] = Sensitivity(error.cpu(), metric.cpu())
    return result
