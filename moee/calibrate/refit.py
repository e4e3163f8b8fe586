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
from moee.calibrate.prefix import holds_prefix, prefix_tokens, token_weights
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
from moee.surroundings import own_arithmetic

RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
LEAST = 1e-12  # mean diagonal of a Gram matrix that is more than rounding
CONSTANT = 2.0**-40  # of the second moment: a variance below is the rounding of float32 means
KEPT = 4  # numbers kept of the images on their way to a later stage, as a multiple of the tokens times the widest layer's width


@torch.no_grad()
def refit_layer(
    layer: NeuronLayer, ffn: FFN, tokens: Tensor, ridge: float | None = None, *, weights: Tensor | None = None
) -> RefitReport:
    """Update `layer.w_down` and `layer.b_out` in place from input tokens [N, D] of its dense original `ffn`.

    `ridge` is lambda as a share of the Gram matrix's mean diagonal; None chooses it on held-out tokens, and leaves the layer as
    it is where none of `RIDGES` lowers their error. `weights` [N]: what each token counts for; None: all alike. Experts that get
    no token keep their bias. Everything lies on one device.
    Raises `UserError` that names the layer for NaN or infinite activations.
    """
    device = tokens.device
    routes = layer.routes(tokens.movedim(-1, 1) if layer.channels_first else tokens)[:, :1]
    parts_wanted = 2 if ridge is None else 1
    grams = [torch.zeros(layer.union, layer.union, device=device) for _ in range(parts_wanted)]
    crosses = [torch.zeros(layer.union, layer.b_out.shape[1], device=device) for _ in range(parts_wanted)]
    missed, power = [0.0] * parts_wanted, [0.0] * parts_wanted  # squares of what the layer misses, and of the dense output
    held_out = held_out_runs(len(tokens)).to(device)
    counts = torch.ones(len(tokens), device=device) if weights is None else weights
    means: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    moment = 0.0
    for e, rows, kept in expert_rows(routes, layer.neurons, layer.offsets):
        halves = [rows[held_out[rows] == bool(which)] for which in range(2)] if parts_wanted > 1 else [rows]
        sums = [ShiftedSums(len(kept), layer.b_out.shape[1], device) for _ in halves]
        shift: tuple[Tensor, Tensor] | None = None
        for half, chosen in zip(sums, halves, strict=True):
            for part in chosen.split(CHUNK) if len(chosen) else ():
                x = tokens[part]
                hidden, target = layer.activations(x, kept), hidden_activations(ffn, x) @ ffn.w_down.T
                if shift is None:
                    shift = hidden.mean(0), target.mean(0)
                half.add(hidden - shift[0], target - shift[1], layer.w_down[kept], counts[part])
        assert shift is not None, "an expert that is listed has tokens"
        # how far the shift lies from the expert's mean
        count = sum(half.count for half in sums)
        hidden_off = torch.stack([half.hidden_sum for half in sums]).sum(0) / count
        target_off = torch.stack([half.target_sum for half in sums]).sum(0) / count
        hidden_mean, target_mean = (shift[0].double() + hidden_off).float(), (shift[1].double() + target_off).float()
        moment += count * float(hidden_mean.double().square().sum())
        for which, half in enumerate(sums):
            part_gram, part_cross = half.centred(hidden_off, target_off, layer.w_down[kept])
            missed[which] += half.missed
            power[which] += half.power
            grams[which].view(-1).index_add_(0, (kept[:, None] * layer.union + kept).flatten(), part_gram.flatten())
            crosses[which].index_add_(0, kept, part_cross)
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


class ShiftedSums:
    """Sums over tokens for a least-squares fit, of values less a shift that lies near their mean: one pass over the tokens, and
    nothing is lost to rounding when the mean is taken off afterwards.

    Of activations H [N, H] and targets T [N, D] less their shifts, and what is missed, R = T - H W: the Gram matrix H'H, the
    cross product H'R, sums over the tokens, and squares; every token times what it counts for.
    """

    def __init__(self, neurons: int, dim: int, device: torch.device):
        self.gram = torch.zeros(neurons, neurons, device=device)
        self.cross = torch.zeros(neurons, dim, device=device)
        self.hidden_sum = torch.zeros(neurons, dtype=torch.float64, device=device)
        self.target_sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.missed = self.power = 0.0
        self.count = 0.0

    def add(self, hidden: Tensor, target: Tensor, weight: Tensor, counts: Tensor) -> None:
        """See activations [N, H] and targets [N, D], less their shifts, that count for `counts` [N]; `weight` W [H, D]."""
        rest, each = target - hidden @ weight, counts[:, None]
        weighed = hidden * each
        self.gram.addmm_(weighed.T, hidden)
        self.cross.addmm_(weighed.T, rest)
        self.hidden_sum += weighed.sum(0, dtype=torch.float64)
        self.target_sum += (target * each).sum(0, dtype=torch.float64)
        self.missed += float((rest.square() * each).sum(dtype=torch.float64))
        self.power += float((target.square() * each).sum(dtype=torch.float64))
        self.count += float(counts.sum(dtype=torch.float64))

    def centred(self, hidden: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """H'H and H'R with the means `hidden` [H] and `target` [D] (float64, less the shifts) taken off; `missed` and `power`
        become those of the centred values."""
        rest, rest_sum = target - hidden @ weight.double(), self.target_sum - self.hidden_sum @ weight.double()
        gram = self.gram - _outer(self.hidden_sum - self.count * hidden, hidden, hidden, self.hidden_sum)
        cross = self.cross - _outer(self.hidden_sum - self.count * hidden, rest, hidden, rest_sum)
        self.missed += float(self.count * rest @ rest - 2 * rest @ rest_sum)
        self.power += float(self.count * target @ target - 2 * target @ self.target_sum)
        return gram, cross


def _outer(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """a b' + c d' in float32."""
    return (torch.outer(a, b) + torch.outer(c, d)).float()


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

    def __init__(self, layer: NeuronLayer, ffn: FFN, ridge: float | None, last: bool, done, prefix=lambda count: 0):
        super().__init__()
        self.layer, self.ffn, self.ridge, self.last, self.done, self.prefix = layer, ffn, ridge, last, done, prefix

    def forward(self, x: Tensor) -> Tensor:
        tokens = as_tokens(x, self.layer.channels_first)
        weights = None
        if x.ndim == 3 and (prefix := self.prefix(x.shape[1])):
            weights = token_weights(x.shape[1], prefix).to(x.device).repeat(len(x))
        with own_arithmetic():  # the model may run under an autocast of its own
            self.done(self.ffn.name, refit_layer(self.layer, self.ffn.to(x.device), tokens.float(), self.ridge, weights=weights))
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

    def prefix_of(count: int) -> int:
        return prefix_tokens(model) if holds_prefix(model, count) else 0

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
            step = _RefitStep(layers[name], ffns[name], ridge, name == group.names[-1], done, prefix_of)
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
