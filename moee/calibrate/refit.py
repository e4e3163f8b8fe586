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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from moee.calibrate.elimination import Elimination
from moee.calibrate.entry import Entry, Inputs, find_entry, gather, taken_up
from moee.calibrate.image_budget import ImageGroup, image_groups, likeness, spread_parts, tokens_an_image
from moee.calibrate.in_step import InStep
from moee.calibrate.layer_sums import CentredSums, LayerPart, Original, RefitStep, centred, find_shifts, part_sums, scale_of
from moee.calibrate.projection import ProjectionStep, project
from moee.calibrate.ridge import LEAST, choose_ridge, held_out_runs, solve_ridge
from moee.calibrate.stream import Stream, target_of
from moee.cures import cures, without
from moee.data.image_set import ImageSet, batches
from moee.errors import StepFailed, UserError
from moee.layers.report import RefitReport
from moee.layers.routed import NeuronLayer
from moee.mlps.attention import narrow_attentions
from moee.models.ffn import FFN
from moee.models.model import replace_module
from moee.parallel.devices import placed
from moee.parallel.group import SOLO, Group, Parcel
from moee.parallel.ordered import PARTS, OrderedSum
from moee.progress import Reporter, silent
from moee.space.limits import USUAL, Limits
from moee.space.machine import give_back
from moee.surroundings import own_arithmetic
from moee.tokens.prefix import holds_prefix, prefix_tokens

CONSTANT = 2.0**-40  # of the second moment: a variance below is the rounding of float32 means
PART_TOKENS = 256  # of an expert on average: with fewer, adding an expert's sums to the layer's takes longer than making them
NO_READER = "refitted to the dense MLP's output, since no module reads what it is added to"
KEPT = 4  # numbers kept of the images on their way to a later stage, as a multiple of the tokens times the widest layer's width


@torch.no_grad()
def refit_layer(
    layer: NeuronLayer, ffn: Original, tokens: Tensor, ridge: float | None = None, *, weights: Tensor | None = None
) -> RefitReport:
    """Update `layer.w_down` and `layer.b_out` in place from input tokens [N, D] of its dense original `ffn`.

    `ridge` is lambda as a share of the Gram matrix's mean diagonal; None chooses it on held-out tokens, and leaves the layer as
    it is where none of `RIDGES` lowers their error. `weights` [N]: what each token counts for; None: all alike. Experts that get
    no token keep their bias. Everything lies on one device.
    Raises `UserError` that names the layer for NaN or infinite activations.
    """
    return refit_from_parts(layer, ffn, [LayerPart(tokens, weights)], ridge)


def refit_from_parts(
    layer: NeuronLayer, ffn: Original, parts: Sequence[LayerPart], ridge: float | None, group: Group = SOLO
) -> RefitReport:
    """`refit_layer` on this rank's parts of the tokens, those of lower ranks first; every rank's layer gets the same bytes. The
    sums are made part by part and added in their order; rank 0 solves. Raises `UserError` where there is no token."""
    device = layer.w_down.device
    shifts, told = find_shifts(layer, ffn, parts, group)
    before, total = sum(told[: group.rank]), sum(told)
    held_out = held_out_runs(total).to(device) if ridge is None else None
    sums = OrderedSum(group)
    with group.agreed():
        for part in parts:
            here = None if held_out is None else held_out[before : before + len(part.tokens)]
            sums.add(part_sums(layer, ffn, part, here, shifts))
            before += len(part.tokens)
    whole = sums.total()
    with group.agreed():
        report = None
        if not total:
            raise UserError(f"none of the images that `{ffn.name}` would be refitted on can be read; check the files")
        if group.leader:
            found = centred(layer, ffn, {name: value.to(device) for name, value in whole.items()}, shifts)
            report = _solve(layer, ffn, found, ridge, total)
    return _shared_layer(layer, report, group)


def _shared_layer(layer: NeuronLayer, report: RefitReport | None, group: Group) -> RefitReport:
    """Rank 0's report, and its solution in every rank's layer."""
    if group.alone:
        assert report is not None, "one rank alone is rank 0"
        return report
    made = {"w_down": layer.w_down.detach(), "b_out": layer.b_out.detach()}
    parcel = group.broadcast(Parcel(None if report is None else asdict(report), made))
    for name, value in parcel.tensors.items():
        getattr(layer, name).data.copy_(value)
    return RefitReport(**parcel.body)


def _solve(layer: NeuronLayer, ffn: Original, found: CentredSums, ridge: float | None, tokens: int) -> RefitReport:
    """Correct the layer by the sums over `tokens` tokens; what was done."""
    if not (torch.isfinite(found.gram).all() and torch.isfinite(found.cross).all()):
        raise UserError(
            f"`{ffn.name}` receives NaN or infinite activations in the refit; "
            + cures("check the weights and the input normalisation", "use --compensation mean", without(ffn.name))
        )
    facts = {"tokens": tokens, "neurons": layer.union}
    if float(found.gram.diagonal(dim1=1, dim2=2).sum(0).double().sum()) <= CONSTANT * found.moment:
        return RefitReport(**facts, note="refit skipped: the activations are constant")
    before = after = None
    if ridge is None:
        crosses = found.cross * scale_of(ffn)
        ridge, gain = choose_ridge(found.gram[0], crosses[0], found.gram[1], crosses[1])
        before = found.missed[1] / found.power[1] if found.power[1] else None
        if ridge is None:
            why = f"{tokens} tokens for {layer.union} neurons"
            return RefitReport(**facts, error_before=before, note=f"refit skipped: {why}, no lambda helps on held-out tokens")
        after = (found.missed[1] + gain) / found.power[1] if found.power[1] else None
    change, used = solve_ridge(found.gram.sum(0), found.cross.sum(0), ridge, LEAST)
    layer.w_down.data += change.float()
    for e, (kept, hidden_mean, target_mean) in found.means.items():
        layer.b_out[e] = ffn.b_down + target_mean - hidden_mean @ layer.w_down[kept]
    note = ""
    if used != ridge:
        note = f"lambda {ridge:g} raised to {used:g}: {tokens} tokens do not determine {layer.union} neurons below that"
    elif tokens < layer.union:
        note = f"refitted on {tokens} tokens for {layer.union} neurons"
    return RefitReport(**facts, ridge=used, error_before=before, error_after=after, note=note)


@torch.inference_mode()
def refit(
    model: nn.Module, layers: dict[str, NeuronLayer], ffns: Mapping[str, Original], data: ImageSet, tokens: int, *,
    ridge: float | None, report: Reporter = silent, group: Group = SOLO, elimination: Elimination | None = None,
    dense: nn.Module | None = None, limits: Limits = USUAL,
) -> dict[str, RefitReport]:  # fmt: skip
    """Refit every layer in `layers`, front to back, on about `tokens` tokens of its own; returns what was done to each. Model and
    layers come and go on the CPU; the work is done on the device of `group`, whose ranks share the images and end with the same
    layers.

    `model` holds the routed layers already; `ffns` are their originals, dense MLPs as a rule. Layers that want as many images
    are refitted in forward passes of these images, in parts that wait for each other at every layer, so that each sees what the
    refitted layers before it produce. Images that only later layers want pass the earlier ones in batches
    (`moee.calibrate.entry`). Memory grows with `tokens` (`moee.space.estimate`).

    With an `elimination` the neurons of each layer are chosen first, on the same tokens; `layers` then holds the new ones.
    With the `dense` model the target of a layer is what brings the residual stream behind it to the dense one's, where a module
    reads what its output is added to (`moee.calibrate.stream`); else it is the dense MLP's output on the layer's own inputs.
    """
    with placed(model, group.device), nullcontext() if dense is None else placed(dense, group.device):
        return _Refit(model, layers, ffns, data, ridge, report, group, elimination, dense, limits).run(limits.refitted(tokens))


@dataclass(frozen=True)
class _Refit:
    """One call of `refit`."""

    model: nn.Module
    layers: dict[str, NeuronLayer]
    ffns: Mapping[str, Original]
    data: ImageSet
    ridge: float | None
    report: Reporter
    group: Group
    elimination: Elimination | None
    dense: nn.Module | None
    limits: Limits

    def run(self, tokens: int) -> dict[str, RefitReport]:
        with self.group.agreed():
            image = next(batches(self.data, 1)).images.to(self.group.device)
            widths = {name: layer.b_out.shape[1] for name, layer in self.layers.items()}
            todo = image_groups(tokens_an_image(self.model, widths, image), len(self.data), tokens, alike=likeness(self.model))
            stream = Stream.of(self.dense, self._mlps(list(self.ffns)), narrow_attentions(self.model), image)
        fewest = min(some.images for some in todo)  # as many as pass the whole model together
        most_kept = KEPT * tokens * max(widths.values())
        parts = min(PARTS, tokens // (PART_TOKENS * max(len(layer.b_out) for layer in self.layers.values())))
        if any(theirs != sorted(stream.readers) for theirs in self.group.all_json(sorted(stream.readers))):
            raise StepFailed("the ranks do not read the model alike; start them on machines of one kind")
        done: dict[str, RefitReport] = {}
        self.report("refit", 0, len(self.layers))
        while todo:
            some = todo.pop(0)
            entry = self._entry(some, done, image) if some.images > fewest else None
            if entry is None and some.images > fewest and len(some.names) > 1:  # something goes past the first: one pass a layer
                todo[:0] = [ImageGroup((name,), some.images) for name in some.names]
                continue
            most = fewest if entry is None else max(fewest, most_kept // entry.numbers)
            with self.group.agreed():
                orders = spread_parts(len(self.data), min(some.images, most), parts)
                models = [self.model] if self.dense is None else [self.model, self.dense]
                passes = self._passes(models, entry, some.names[0], orders, image)
            self._refit(some.names, passes, stream, done)
        return {name: done[name] for name in self.layers}

    def _mlps(self, names: Sequence[str]) -> list[FFN]:
        """The dense MLPs among the originals of these names, where the work is done."""
        near = (self.ffns[name].to(self.group.device) for name in names)
        return [ffn for ffn in near if isinstance(ffn, FFN)]

    def _entry(self, some: ImageGroup, done: Mapping[str, RefitReport], image: Tensor) -> Entry | None:
        """Where the passes of these layers begin, on every rank at the same place; None: at the model's beginning."""
        with self.group.agreed():
            entry = find_entry(self.model, some.names, done, image)
        found = self.group.all_json(None if entry is None else entry.name)
        with self.group.agreed():
            if any(name != found[0] for name in found):
                raise StepFailed("the ranks do not read the model alike; start them on machines of one kind")
        return entry

    def _passes(
        self, models: Sequence[nn.Module], entry: Entry | None, first: str, orders: Sequence[Tensor], image: Tensor
    ) -> list[list[Callable[[], object]]]:
        """For each of the models forward passes over this rank's parts of the images, in those `orders`, from the entry on."""
        mine = [orders[part] for part in self.group.part(len(orders))]
        steps, taken = sum(-(-len(order) // self.limits.forward) for order in mine) * len(models), 0

        def images(order: Tensor) -> Iterator[Tensor]:
            nonlocal taken
            for batch in batches(self.data, self.limits.forward, order=order, strict=False):
                yield batch.images.to(image.device)
                taken += 1
                if entry is not None:
                    self.report(f"refit, images for {first}", taken, steps)

        passes: list[list[Callable[[], object]]] = [[] for _ in models]
        for order in mine:
            if entry is None:
                seen = [*images(order)]
                whole = torch.cat(seen) if seen else None  # none of this part can be read
                for own, model in zip(passes, models, strict=True):
                    own += [] if whole is None else [partial(model, whole)]
                continue
            for own, model in zip(passes, models, strict=True):
                late = images(order)
                if (head := next(late, None)) is not None:
                    inputs = gather(model, entry, chain([head], late), len(order))
                    own.append(partial(_from_entry, model, entry, inputs, image))
        return passes

    def _refit(
        self, names: Sequence[str], passes: Sequence[Sequence[Callable[[], object]]], stream: Stream, done: dict[str, RefitReport]
    ) -> None:
        """Refit the layers of these names as the passes come to them; the second ones are of the dense model."""

        def prefix_of(count: int) -> int:
            return prefix_tokens(self.model) if holds_prefix(self.model, count) else 0

        steps = {name: RefitStep(self.layers[name], self.ffns[name], prefix_of) for name in names}
        for name, step in steps.items():
            replace_module(self.model, name, step)
        narrowed, added = narrow_attentions(self.model), [name for name in names if name in stream.readers]
        projections = {n: ProjectionStep(narrowed[stream.attentions[n].name]) for n in added if n in stream.attentions}
        for name in projections:
            replace_module(self.model, stream.attentions[name].name, projections[name])
        try:
            with ExitStack() as stack:
                stack.enter_context(stream.waiting(self._mlps(added)))
                stack.enter_context(stream.noted(self.model, added))
                running, *beside = (stack.enter_context(InStep(works)) for works in passes)
                for name, step in steps.items():
                    ffn = self.ffns[name].to(self.group.device)
                    if name in projections:
                        waiting, site = projections[name], stream.attentions[name]
                        project(waiting, site, running, beside[0], prefix_of=prefix_of, group=self.group)
                    with self.group.agreed():
                        parts = [step.part(one.x) for one in running.bring(step, name)]
                        if name in added:
                            given = zip(parts, beside[0].bring(name, name), running.passes, strict=True)
                            wanted = ((p, target_of(d.x, own.beside, ffn.scale)) for p, d, own in given)
                            parts = [replace(part, targets=target.sub_(ffn.b_down)) for part, target in wanted]
                    with own_arithmetic():
                        if self.elimination is not None:
                            assert isinstance(ffn, FFN), "neurons are chosen anew for dense MLPs alone"
                            step.layer = self.layers[name] = self.elimination.chosen(self.layers[name], ffn, parts, self.group)
                        report = refit_from_parts(self.layers[name], ffn, parts, self.ridge, self.group)
                    if self.dense is not None and name not in added:
                        report = replace(report, note="; ".join(filter(None, [report.note, NO_READER])))
                    done[name], step.ready = report, True
                    parts.clear()  # the passes bring others, and need the memory
                    give_back()  # every pass has freed some of it in a thread of its own
                    self.report("refit", len(done), len(self.layers))
        finally:
            for name in names:
                replace_module(self.model, name, self.layers[name])
            for name in projections:
                replace_module(self.model, stream.attentions[name].name, projections[name].attention)


def _from_entry(model: nn.Module, entry: Entry, inputs: Inputs, image: Tensor) -> None:
    with taken_up(model, entry, inputs):
        model(image)
