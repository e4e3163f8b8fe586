"""Refit: correct the shared down projection and each expert's output bias in closed form (no gradient step).

Per layer, on the inputs that the MoEE model itself produces: with A [N, U] the masked activations and R [N, D] what the
routed FFN misses of the dense output, both centred per expert, solve

    dW = (A^T A + lambda * mean(diag(A^T A)) I)^-1 A^T R,      w_down += dW

and then set b_out[e] so that expert e's mean output equals the dense one. Unless it is given, lambda is the one of `RIDGES` whose
solution on four fifths of the tokens leaves the least error on the other fifth (runs of neighbouring tokens, so that an
image's tokens mostly stay together).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moee.activations import activate
from moee.calibration import CHUNK, as_tokens, hidden_activations
from moee.data import ImageSet, batches
from moee.layer import RoutedFFN
from moee.models import FFN, replace_module
from moee.progress import Reporter, silent

RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
FOLDS, RUN = 5, 256  # every fifth run of 256 tokens is held out to choose lambda


def _expert_activations(layer: RoutedFFN, tokens: Tensor, kept: Tensor) -> Tensor:
    return activate(torch.addmm(layer.b_up[kept], tokens, layer.w_up[kept].T), layer.activation)


@torch.no_grad()
def refit_layer(layer: RoutedFFN, ffn: FFN, tokens: Tensor, ridge: float | None = None) -> float:
    """Update `layer.w_down` and `layer.b_out` in place from input tokens [N, D] of its dense original `ffn`.

    `ridge` is lambda as a share of the Gram matrix's mean diagonal; None chooses it on held-out tokens. Returns the lambda
    used. Experts that get no token keep their bias.
    """
    routes = layer.routes(tokens.movedim(-1, 1) if layer.channels_first else tokens)[:, 0]
    bounds = layer.offsets.tolist()
    parts_wanted = 2 if ridge is None else 1
    grams = [torch.zeros(layer.union, layer.union) for _ in range(parts_wanted)]
    crosses = [torch.zeros(layer.union, layer.b_out.shape[1]) for _ in range(parts_wanted)]
    held_out = torch.arange(len(tokens)) // RUN % FOLDS == FOLDS - 1
    means: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for e in range(layer.num_experts):
        rows = (routes == e).nonzero()[:, 0]
        if not len(rows):
            continue
        kept = layer.neurons[bounds[e] : bounds[e + 1]].long()
        target_sum, hidden_sum = torch.zeros(layer.b_out.shape[1]).double(), torch.zeros(len(kept)).double()
        parts = rows.split(CHUNK)
        for part in parts:  # first the means, so that centring needs no second copy of a large expert
            target = hidden_activations(ffn, tokens[part]) @ ffn.w_down.T
            target_sum += target.double().sum(0)
            hidden_sum += _expert_activations(layer, tokens[part], kept).double().sum(0)
        target_mean, hidden_mean = (target_sum / len(rows)).float(), (hidden_sum / len(rows)).float()
        for which, (gram, cross) in enumerate(zip(grams, crosses, strict=True)):
            chosen = rows[held_out[rows] == bool(which)] if parts_wanted > 1 else rows
            part_gram, part_cross = torch.zeros(len(kept), len(kept)), torch.zeros(len(kept), cross.shape[1])
            for part in chosen.split(CHUNK):
                hidden = _expert_activations(layer, tokens[part], kept) - hidden_mean
                target = hidden_activations(ffn, tokens[part]) @ ffn.w_down.T - target_mean
                part_gram += hidden.T @ hidden
                part_cross += hidden.T @ (target - hidden @ layer.w_down[kept])
            gram.view(-1).index_add_(0, (kept[:, None] * layer.union + kept).flatten(), part_gram.flatten())
            cross.index_add_(0, kept, part_cross)
        means[e] = (kept, hidden_mean, target_mean)
    if ridge is None:
        ridge = choose_ridge(grams[0], crosses[0], grams[1], crosses[1])
    layer.w_down.data += _solve(torch.stack(grams).sum(0), torch.stack(crosses).sum(0), ridge).float()
    for e, (kept, hidden_mean, target_mean) in means.items():
        layer.b_out[e] = ffn.b_down + target_mean - hidden_mean @ layer.w_down[kept]
    return ridge


def _solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(G + ridge mean(diag G) I)^-1 C in float64."""
    system = gram.double()
    system.diagonal().add_(ridge * system.diagonal().mean().clamp(min=1e-12))
    return torch.cholesky_solve(cross.double(), torch.linalg.cholesky(system))


def choose_ridge(gram: Tensor, cross: Tensor, held_gram: Tensor, held_cross: Tensor) -> float:
    """The lambda of `RIDGES` whose solution dW on (gram, cross) leaves the least squared error on the held-out tokens:
    |R - A dW|^2 = |R|^2 - 2 tr(dW' C) + tr(dW' G dW). The largest where nothing is held out."""
    best, least = RIDGES[-1], torch.inf
    held_gram, held_cross = held_gram.double(), held_cross.double()
    for ridge in reversed(RIDGES):
        delta = _solve(gram, cross, ridge)
        error = float((delta * (held_gram @ delta - 2 * held_cross)).sum())
        if error < least:
            best, least = ridge, error
    return best


class _RefitStep(nn.Module):
    """Stands where a routed layer will be for one forward pass: refits it on the pass's own input, then applies it."""

    def __init__(self, layer: RoutedFFN, ffn: FFN, ridge: float | None, done):
        super().__init__()
        self.layer, self.ffn, self.ridge, self.done = layer, ffn, ridge, done

    def forward(self, x: Tensor) -> Tensor:
        refit_layer(self.layer, self.ffn, as_tokens(x, self.layer.channels_first), self.ridge)
        self.done()
        parts = [self.layer(part) for part in x.split(max(1, CHUNK * len(x) // max(1, x.numel() // self.ffn.dim)))]
        return torch.cat(parts)


@torch.inference_mode()
def refit(
    model: nn.Module, layers: dict[str, RoutedFFN], ffns: dict[str, FFN], data: ImageSet, tokens: int, ridge: float | None,
    report: Reporter = silent,
) -> None:  # fmt: skip
    """Refit every layer in `layers`, front to back, in one forward pass over at most `tokens` tokens' worth of images.

    `model` holds the routed layers already; `ffns` are their dense originals. All images pass together, so that each layer
    sees what the refitted layers before it produce; memory grows with `tokens` (about 40 bytes x D a token).
    """
    images = _first_images(model, next(iter(layers)), data, tokens)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        report("refit", done, len(layers))

    for name, layer in layers.items():
        replace_module(model, name, _RefitStep(layer, ffns[name], ridge, count))
    try:
        report("refit", 0, len(layers))
        model(images)
    finally:
        for name, layer in layers.items():
            replace_module(model, name, layer)


def _first_images(model: nn.Module, name: str, data: ImageSet, tokens: int) -> Tensor:
    """Images spread evenly over the data set whose tokens in the first routed layer fit the budget."""
    count = 0

    def hook(module, args):
        nonlocal count
        count = args[0].numel() // module.b_out.shape[1]

    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    try:
        model(next(batches(data, 1)).images)
    finally:
        handle.remove()
    wanted = min(len(data), max(1, tokens // count))
    order = torch.linspace(0, len(data) - 1, wanted).round().long().unique()
    return torch.cat([batch.images for batch in batches(data, 32, order=order)])
