"""Refit: correct the shared down projection and each expert's output bias in closed form (no gradient step).

Per layer, on the inputs that the MoEE model itself produces (about as many tokens as asked for, whatever the layer's resolution:
`moee.calibrate.image_budget`): with A [N, U] the masked activations and R [N, D] what the
routed FFN misses of the dense output, both centred per expert, solve

    dW = (A^T A + lambda * mean(diag(A^T A)) I)^-1 A^T R,      w_down += dW

and then set b_out[e] so that expert e's mean output equals the dense one. Unless it is given, lambda is the one of `RIDGES` whose
solution on four fifths of the tokens leaves the least error on the other fifth (runs of neighbouring tokens, so that an
image's tokens mostly stay together).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moee.calibrate.calibration import BATCH_SIZE, CHUNK, as_tokens, hidden_activations
from moee.calibrate.entry import Entry, Reached, find_entry, gather, run_until_reached, taken_up
from moee.calibrate.image_budget import ImageGroup, image_groups, spread, tokens_an_image
from moee.calibrate.ridge import error_change, held_out_runs, solve_ridge
from moee.data.image_set import ImageSet, batches
from moee.errors import UserError
from moee.layers.ops import expert_rows
from moee.layers.report import RefitReport
from moee.layers.routed import NeuronLayer
from moee.models.ffn import FFN
from moee.models.model import replace_module
from moee.parallel.devices import CPU, placed
from moee.progress import Reporter, silent, track

RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
LEAST = 1e-12  # mean diagonal of a Gram matrix that is more than rounding
CONSTANT = 2.0**-40  # of the second moment: a variance below is the rounding of float32 means
KEPT = 4  # numbers kept of the images on their way to a later stage, as a multiple of the tokens times the widest layer's width


@torch.no_grad()
def refit_layer(layer: NeuronLayer, ffn: FFN, tokens: Tensor, ridge: float | None = None) -> RefitReport:
    """Update `layer.w_down` and `layer.b_out` in place from input tokens [N, D] of its dense original `ffn`.

    `ridge` is lambda as a share of the Gram matrix's mean diagonal; None chooses it on held-out tokens, and leaves the layer as
    it is where none of `RIDGES` lowers their error. Experts that get no token keep their bias. Everything lies on one device.
    Raises `UserError` that names the layer for NaN or infinite activations.
    """
    device = tokens.device
    routes = layer.routes(tokens.movedim(-1, 1) if layer.channels_first else tokens)[:, :1]
    parts_wanted = 2 if ridge is None else 1
    grams = [torch.zeros(layer.union, layer.union, device=device) for _ in range(parts_wanted)]
    crosses = [torch.zeros(layer.union, layer.b_out.shape[1], device=device) for _ in range(parts_wanted)]
    missed, power = [0.0] * parts_wanted, [0.0] * parts_wanted  # squares of what the layer misses, and of the dense output
    held_out = held_out_runs(len(tokens)).to(device)
    means: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    moment = 0.0
    for e, rows, kept in expert_rows(routes, layer.neurons, layer.offsets):
        target_sum = torch.zeros(layer.b_out.shape[1], dtype=torch.float64, device=device)
        hidden_sum = torch.zeros(len(kept), dtype=torch.float64, device=device)
        parts = rows.split(CHUNK)
        for part in parts:  # first the means, so that centring needs no second copy of a large expert
            target = hidden_activations(ffn, tokens[part]) @ ffn.w_down.T
            target_sum += target.double().sum(0)
            hidden_sum += layer.activations(tokens[part], kept).double().sum(0)
        target_mean, hidden_mean = (target_sum / len(rows)).float(), (hidden_sum / len(rows)).float()
        moment += len(rows) * float(hidden_mean.double().square().sum())
        for which, (gram, cross) in enumerate(zip(grams, crosses, strict=True)):
            chosen = rows[held_out[rows] == bool(which)] if parts_wanted > 1 else rows
            part_gram = torch.zeros(len(kept), len(kept), device=device)
            part_cross = torch.zeros(len(kept), cross.shape[1], device=device)
            for part in chosen.split(CHUNK):
                hidden = layer.activations(tokens[part], kept) - hidden_mean
                target = hidden_activations(ffn, tokens[part]) @ ffn.w_down.T - target_mean
                rest = target - hidden @ layer.w_down[kept]
                part_gram += hidden.T @ hidden
                part_cross += hidden.T @ rest
                missed[which] += float(rest.square().sum(dtype=torch.float64))
                power[which] += float(target.square().sum(dtype=torch.float64))
            gram.view(-1).index_add_(0, (kept[:, None] * layer.union + kept).flatten(), part_gram.flatten())
            cross.index_add_(0, kept, part_cross)
        means[e] = (kept, hidden_mean, target_mean)
    if not all(torch.isfinite(t).all() for t in (*grams, *crosses)):
        raise UserError(
            f"`{ffn.name}` receives NaN or infinite activations in the refit; check the weights and the input normalisation, use "
            f"--compensation mean, or skip the layer with --exclude {ffn.name}"
        )
    gram, cross = torch.stack(grams).sum(0), torch.stack(crosses).sum(0)
    facts = {"tokens": len(tokens), "neurons": layer.union}
    if float(gram.diagonal().double().sum()) <= CONSTANT * moment:
        return RefitReport(**facts, note="refit skipped: the activations are constant")
    before = after = None
    if ridge is None:
        ridge, gain = choose_ridge(grams[0], crosses[0], grams[1], crosses[1])
        before = missed[1] / power[1] if power[1] else None
        if ridge is None:
            why = f"{len(tokens)} tokens for {layer.union} neurons"
            return RefitReport(**facts, error_before=before, note=f"refit skipped: {why}, no lambda helps on held-out tokens")
        after = (missed[1] + gain) / power[1] if power[1] else None
    change, used = solve_ridge(gram, cross, ridge, LEAST)
    layer.w_down.data += change.float()
    for e, (kept, hidden_mean, target_mean) in means.items():
        layer.b_out[e] = ffn.b_down + target_mean - hidden_mean @ layer.w_down[kept]
    note = ""
    if used != ridge:
        note = f"lambda {ridge:g} raised to {used:g}: {len(tokens)} tokens do not determine {layer.union} neurons below that"
    elif len(tokens) < layer.union:
        note = f"refitted on {len(tokens)} tokens for {layer.union} neurons"
    return RefitReport(**facts, ridge=used, error_before=before, error_after=after, note=note)


def choose_ridge(gram: Tensor, cross: Tensor, held_gram: Tensor, held_cross: Tensor) -> tuple[float | None, float]:
    """The lambda of `RIDGES` whose solution dW on (gram, cross) leaves the least squared error on the held-out tokens, and the
    change of that error. None and 0 where no lambda lowers it, or nothing is held out."""
    best: tuple[float | None, float] = None, 0.0
    for ridge in reversed(RIDGES):
        delta, used = solve_ridge(gram, cross, ridge, LEAST)
        error = error_change(delta, held_gram, held_cross)
        if error < best[1]:
            best = used, error
    return best


class _RefitStep(nn.Module):
    """Stands where a routed layer will be for one forward pass: refits it on the pass's own input, then applies it, unless it is
    the last."""

    def __init__(self, layer: NeuronLayer, ffn: FFN, ridge: float | None, last: bool, done):
        super().__init__()
        self.layer, self.ffn, self.ridge, self.last, self.done = layer, ffn, ridge, last, done

    def forward(self, x: Tensor) -> Tensor:
        tokens = as_tokens(x, self.layer.channels_first)
        self.done(self.ffn.name, refit_layer(self.layer, self.ffn.to(x.device), tokens, self.ridge))
        if self.last:
            raise Reached
        parts = [self.layer(part) for part in x.split(max(1, CHUNK * len(x) // max(1, x.numel() // self.ffn.dim)))]
        return torch.cat(parts)


@torch.inference_mode()
def refit(
    model: nn.Module, layers: dict[str, NeuronLayer], ffns: dict[str, FFN], data: ImageSet, tokens: int, *, ridge: float | None,
    report: Reporter = silent, device: torch.device = CPU,
) -> dict[str, RefitReport]:  # fmt: skip
    """Refit every layer in `layers`, front to back, on about `tokens` tokens of its own; returns what was done to each. Model and
    layers come and go on the CPU; the work is done on `device`.

    `model` holds the routed layers already; `ffns` are their dense originals. Layers that want as many images are refitted in
    one forward pass of all these images together, so that each sees what the refitted layers before it produce. Images that
    only later layers want pass the earlier ones in batches (see `moee.calibrate.entry`). Memory grows with `tokens`: about 40
    bytes x D a token.
    """
    with placed(model, device):
        return _refit(model, layers, ffns, data, tokens, ridge, report, device)


def _refit(
    model: nn.Module, layers: dict[str, NeuronLayer], ffns: dict[str, FFN], data: ImageSet, tokens: int, ridge: float | None,
    report: Reporter, device: torch.device,
) -> dict[str, RefitReport]:  # fmt: skip
    image = next(batches(data, 1)).images.to(device)
    widths = {name: layer.b_out.shape[1] for name, layer in layers.items()}
    groups = image_groups(tokens_an_image(model, widths, image), len(data), tokens)
    fewest = min(group.images for group in groups)  # as many as pass the whole model together
    most_kept = KEPT * tokens * max(widths.values())
    reports: dict[str, RefitReport] = {}

    def done(name: str, facts: RefitReport) -> None:
        reports[name] = facts
        report("refit", len(reports), len(layers))

    report("refit", 0, len(layers))
    while groups:
        group = groups.pop(0)
        entry = find_entry(model, group.names, reports, image) if group.images > fewest else None
        if entry is None and group.images > fewest and len(group.names) > 1:  # something goes past the first: one pass a layer
            groups[:0] = [ImageGroup((name,), group.images) for name in group.names]
            continue
        for name in group.names:
            step = _RefitStep(layers[name], ffns[name], ridge, name == group.names[-1], done)
            replace_module(model, name, step)
        try:
            if entry is None:
                run_until_reached(model, torch.cat(list(_images(data, fewest, device))))
            else:
                _run_from(model, entry, group, data, max(fewest, most_kept // entry.numbers), image, report)
        finally:
            for name in group.names:
                replace_module(model, name, layers[name])
    return {name: reports[name] for name in layers}


def _run_from(
    model: nn.Module, entry: Entry, group: ImageGroup, data: ImageSet, most: int, image: Tensor, report: Reporter
) -> None:
    """A pass that begins at the entry, with the group's images but at most `most`."""
    wanted = min(group.images, most)
    parts = track(_images(data, wanted, image.device), f"refit, images for {group.names[0]}", -(-wanted // BATCH_SIZE), report)
    with taken_up(model, entry, gather(model, entry, parts, wanted)):
        run_until_reached(model, image)


def _images(data: ImageSet, wanted: int, device: torch.device) -> Iterator[Tensor]:
    """Batches of images spread evenly over the data set."""
    for batch in batches(data, BATCH_SIZE, order=spread(len(data), wanted)):
        yield batch.images.to(device)
