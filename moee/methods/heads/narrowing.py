"""Fewer dimensions a head, and in which layers: what `--attention-macs` does, by the closed form of `moee.methods.heads.fit`.

How many dimensions each layer keeps is measured: the loss of the model's output on calibration images with one layer narrowed
at a time, then steps of STEP dimensions where they cost least a MAC. The layers are then made front to back, each on the inputs
that the narrowed ones before it produce.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from timm.layers import Attention
from torch import Tensor, nn

from moee.calibrate.in_step import InStep, WaitingStep
from moee.data.image_set import ImageSet, batches
from moee.errors import UserError
from moee.interface.adapted import run_model
from moee.interface.watch import watched
from moee.methods.heads.fit import BATCH, Bases, HeadMoments, find_bases, fit_projection, narrowed, projection_sums
from moee.methods.heads.widths import check_reach, choose_widths, full_widths, moves
from moee.mlps.attention import NarrowAttention, Widths, find_attentions, input_shapes
from moee.models.ffn import channels_last
from moee.models.model import Shape, replace_module
from moee.parallel.devices import placed
from moee.parallel.group import SOLO, Group, Parcel
from moee.parallel.ordered import OrderedSum, cut
from moee.progress import Reporter, silent, track
from moee.tokens.prefix import prefix_tokens
from moee.train.step import distillation_loss, token_loss

NUMBERS = 120_000 * 384  # tokens times their width in the fit, which holds all of a layer's inputs at once
TOKENS = 120_000  # a layer of the fit
TRIAL = 3  # times fewer tokens make the moments with which widths are tried
PROBES = 48  # images on which each width of each layer is tried; none of those with which it was made
PROBE_NUMBERS = 1 << 28  # inputs of all blocks on the probes


class _NarrowStep(WaitingStep):
    """Stands where a narrowed attention will be: passes wait here until it is made from what they bring."""

    def __init__(self, name: str, attention: Attention, widths: Widths, scale: Tensor | None, prefix: int):
        super().__init__()
        self.name, self.attention, self.widths, self.scale, self.prefix = name, attention, widths, scale, prefix
        self.made: NarrowAttention | None = None

    def apply_to(self, x: Tensor) -> Tensor:
        assert self.made is not None, "a pass waits until the layer is there"
        return torch.cat([self.made(part) for part in x.split(BATCH)])

    def make(self, parts: Sequence[Tensor], group: Group) -> None:
        """Make it from all ranks' tokens [B, N, D], of which `parts` are this one's. Rank 0 solves; every rank gets the same."""
        moments, reads = OrderedSum(group), []
        with group.agreed():
            for x in parts:
                seen = HeadMoments(self.attention, self.prefix)
                reads.append([seen.add(part) for part in x.split(BATCH)])
                moments.add(seen.sums())
        whole = moments.total()
        with group.agreed():
            if group.leader:
                seen = HeadMoments(self.attention, self.prefix)
                seen.put(whole)
                _require_finite(self.name, seen)
                scale = None if self.scale is None else self.scale.to(group.device)
                self.made = narrowed(self.attention, find_bases(seen, scale), self.widths, seen)
        made, sums = self._shared(group), OrderedSum(group)
        with group.agreed():
            for x, read in zip(parts, reads, strict=True):
                sums.add(projection_sums(made, self.attention, x, self.prefix, reads=read))
        whole = sums.total()
        with group.agreed():
            if group.leader:
                fit_projection(made, {name: value.to(group.device) for name, value in whole.items()})
        self.made = self._shared(group)

    def _shared(self, group: Group) -> NarrowAttention:
        """What rank 0 has made, on every rank."""
        made = self.made
        if made is None:
            dim, heads, head_dim = self.attention.qkv.in_features, self.attention.num_heads, self.attention.head_dim
            made = NarrowAttention(dim, heads, head_dim, self.widths).to(group.device).eval()
        state = group.broadcast(Parcel(None, made.state_dict())).tensors
        if not group.leader:
            made.load_state_dict(dict(state))
        return made


class _Skip(nn.Module):
    """A block that passes its input on."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x


@torch.no_grad()
def narrow(
    model: nn.Module, data: ImageSet, shape: Shape, share: float, equal: bool = False, *, report: Reporter = silent,
    losses: dict[tuple[str, Widths], float] | None = None, group: Group = SOLO, probes: int = PROBES, tokens: int = TOKENS,
) -> dict[str, Widths]:  # fmt: skip
    """Replace the attentions of `model` in place by narrower ones that keep the share `share` of the attention's MACs.

    `data` is the calibration set, of images of `shape`; with `equal` a layer's queries, keys and values get as many
    dimensions. A layer is fitted on about `tokens` of its tokens, but at most `NUMBERS`. `losses`, of `width_losses` for the same
    model, data and number of `probes`, serve every share; None measures them. Returns the widths
    of the layers that changed. Deterministic for one data set and thread count. Raises `UserError` for a model whose attentions
    cannot be narrowed, too small a share, fewer than two images or broken activations. Memory grows with `NUMBERS`: the inputs of
    a layer for all images of the fit, and its hidden activations. The model comes and goes on the CPU, in eval mode; the work is
    done on the device of `group`, whose ranks share the images of the fit and get the same layers.
    """
    model.eval()
    attentions = find_attentions(model)
    shapes = input_shapes(model, attentions, shape)
    with group.agreed():
        check_reach(attentions, shapes, share)
    if losses is None:
        losses = width_losses(model, data, shape, equal, report, group=group, probes=probes, tokens=tokens)
    with group.agreed():
        _, images = _images(data, *_numbers(attentions, shapes), probes, tokens)
    chosen = choose_widths(attentions, shapes, losses, share, equal)
    steps = {
        name: _NarrowStep(name, attentions[name], widths, _scale(model, name), prefix_tokens(model))
        for name, widths in chosen.items()
        if widths != full_widths(attentions[name])
    }
    runs = cut(len(images))
    share_of_runs = group.part(len(runs))
    own = [images[run.start : run.stop] for run in runs[share_of_runs.start : share_of_runs.stop]]
    for name, step in steps.items():
        replace_module(model, name, step)
    with placed(model, group.device):
        try:
            with InStep([partial(model, some.to(group.device)) for some in own]) as running:
                for name, step in steps.items():
                    with group.agreed():
                        parts = [one.x for one in running.bring(step, name)]
                    step.make(parts, group)
                    step.ready = True
                    parts.clear()  # the passes bring others, and need the memory
        finally:
            for name in steps:
                replace_module(model, name, attentions[name])
        for name, step in steps.items():
            assert step.made is not None, "every step was made"
            replace_module(model, name, step.made)
    return {name: step.widths for name, step in steps.items()}


@torch.no_grad()
def width_losses(
    model: nn.Module, data: ImageSet, shape: Shape, equal: bool = False, report: Reporter = silent, *, group: Group = SOLO,
    probes: int = PROBES, tokens: int = TOKENS,
) -> dict[tuple[str, Widths], float]:  # fmt: skip
    """What `narrow` chooses widths by: the loss of the output with one attention, by its name, narrowed to each width.

    Arguments, errors and memory are those of `narrow`. Each width is made from the moments of a third of the tokens and
    tried on `probes` other images. The model stays as it is, in eval mode. The ranks of `group` share the images of the moments,
    then the attentions.
    """
    model.eval()
    attentions = find_attentions(model)
    shapes = input_shapes(model, attentions, shape)
    an_image, dim, layers = _numbers(attentions, shapes)
    with group.agreed():
        tried, images = _images(data, an_image, dim, layers, probes, tokens)
    few = images[: max(2, tokens // TRIAL // an_image)]
    with placed(model, group.device):
        moments = _moments(model, attentions, few, report, group)
        own = list(attentions)[group.rank :: group.world]
        with group.agreed():
            found = _losses(model, {name: moments[name] for name in own}, tried.to(group.device), equal, report)
    told = [one for rank in group.all_json([[name, w.qk, w.v, loss] for (name, w), loss in found.items()]) for one in rank]
    return {(name, Widths(qk, v)): loss for name, qk, v, loss in told}


def _numbers(attentions: dict[str, Attention], shapes: dict[str, tuple[int, int]]) -> tuple[int, int, int]:
    """Tokens of an image that an attention sees at most, their width, and how many attentions there are."""
    tokens = max(images * tokens for images, tokens in shapes.values())
    return tokens, next(iter(attentions.values())).qkv.in_features, len(attentions)


def _images(data: ImageSet, tokens: int, dim: int, layers: int, wanted: int, most: int) -> tuple[Tensor, Tensor]:
    """Images to try widths on, `wanted` of them, and others to fit with, of `most` tokens together, both drawn over all readable
    ones of `data`. `tokens`: of an image."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    probes = min(wanted, max(4, PROBE_NUMBERS // (layers * tokens * dim)))
    fit = max(4, min(NUMBERS // dim, most) // tokens)
    images = torch.cat([batch.images for batch in batches(data, BATCH, order=order[: probes + fit])])
    if len(images) < 2:
        raise UserError(f"--attention-macs needs at least 2 readable images, came {len(images)}; add some or leave it out")
    probes = min(probes, len(images) // 2)
    return images[:probes], images[probes:]


def _require_finite(name: str, moments: HeadMoments) -> None:
    """Raises `UserError` that names the attention if it saw broken activations."""
    if not all(torch.isfinite(t).all() for t in (moments.query, moments.key, moments.read)):
        raise UserError(
            f"`{name}` receives NaN or infinite activations on the calibration data; check the weights and the input "
            "normalisation"
        )


def _scale(model: nn.Module, name: str) -> Tensor | None:
    """Weight [D] of the LayerScale behind an attention, if there is one."""
    block = model.get_submodule(name.rpartition(".")[0])
    gamma = getattr(getattr(block, "ls1", None) or getattr(block, "ls", None), "gamma", None)  # `ls`: timm's parallel blocks
    return gamma.detach().flatten() if isinstance(gamma, Tensor) else None


def _moments(
    model: nn.Module, attentions: dict[str, Attention], images: Tensor, report: Reporter, group: Group
) -> dict[str, HeadMoments]:
    """Every attention's moments over the images, of which each rank sees its share."""
    runs, sums = cut(len(images)), OrderedSum(group)
    share = group.part(len(runs))
    with group.agreed():
        for run in track(runs[share.start : share.stop], "attention", len(share), report):
            seen = _seen(model, attentions, images[run.start : run.stop].to(group.device))
            sums.add({f"{name} {what}": value for name, each in seen.items() for what, value in each.sums().items()})
    whole = group.broadcast(Parcel(None, sums.total())).tensors
    moments = {name: HeadMoments(attention, prefix_tokens(model)) for name, attention in attentions.items()}
    with group.agreed():
        for name, each in moments.items():
            each.put({what: whole[f"{name} {what}"] for what in each.sums()})
            _require_finite(name, each)
    return moments


def _seen(model: nn.Module, attentions: dict[str, Attention], images: Tensor) -> dict[str, HeadMoments]:
    """Moments of what the attentions get of these images."""
    moments = {name: HeadMoments(attention, prefix_tokens(model)) for name, attention in attentions.items()}
    with watched(model, attentions, lambda name, x: moments[name].add(x)):
        for part in images.split(BATCH):
            model(part)
    return moments


def _losses(
    model: nn.Module, moments: Mapping[str, HeadMoments], probes: Tensor, equal: bool, report: Reporter
) -> dict[tuple[str, Widths], float]:
    """Loss of the model's output on `probes`, one layer at a time narrowed to each of its `moves` by its moments."""
    attentions = {name: each.attention for name, each in moments.items()}
    inputs: dict[str, Tensor] = {}
    first = {name.rpartition(".")[0]: name for name in attentions}  # the block of each attention
    with watched(model, first, lambda block, x: inputs.__setitem__(first[block], x)):
        reference = _outputs(model, probes)
    classifier = bool(getattr(model, "num_classes", 0))
    tried = [(name, widths) for name, a in attentions.items() for widths in moves(a.head_dim, equal)]
    losses = {}
    bases: tuple[str, Bases] | None = None
    for name, widths in track(tried, "attention widths", len(tried), report):
        if bases is None or bases[0] != name:
            bases = name, find_bases(moments[name], _scale(model, name))
        with _standing_in(model, name, narrowed(attentions[name], bases[1], widths, moments[name]), inputs[name]):
            output, last = _outputs(model, probes)
        loss = distillation_loss(output, reference[0], classifier)
        if last is not None and reference[1] is not None:
            loss = loss + token_loss(last, reference[1])
        losses[name, widths] = float(loss)
    return losses


def _outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Outputs [B, C] and the last feature map [B, ..., D], where there is one."""
    output, features = run_model(model, images)
    return output, channels_last(features, model) if isinstance(features, Tensor) else None


@contextmanager
def _standing_in(model: nn.Module, name: str, made: NarrowAttention, block_input: Tensor) -> Iterator[None]:
    """The model with `made` for the attention `name`. Blocks before it are skipped: `block_input` is what they lead to."""
    original = model.get_submodule(name)
    block = name.rpartition(".")[0]
    before: dict[str, nn.Module] = {}
    parent, _, index = block.rpartition(".")
    blocks = getattr(model, parent, None) if parent and "." not in parent else None
    if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and index.isdecimal():
        before = {f"{parent}.{i}": blocks[i] for i in range(int(index))}
    handle = None
    replace_module(model, name, made)
    for other in before:
        replace_module(model, other, _Skip())
    if before:
        handle = model.get_submodule(block).register_forward_pre_hook(lambda module, args: (block_input, *args[1:]))
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        for other, module in before.items():
            replace_module(model, other, module)
        replace_module(model, name, original)


