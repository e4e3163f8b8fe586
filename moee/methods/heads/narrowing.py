"""Fewer dimensions a head, and in which layers: what `--attention-macs` does, by the closed form of `moee.methods.heads.fit`.

How many dimensions each layer keeps is measured: the loss of the model's output on calibration images with one layer narrowed
at a time, then steps of STEP dimensions where they cost least a MAC. The layers are then made front to back, each on the inputs
that the narrowed ones before it produce.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.layers import Attention
from torch import Tensor, nn

from moee.calibrate.prefix import prefix_tokens
from moee.data.image_set import ImageSet, batches
from moee.errors import UserError
from moee.interface.adapted import run_model
from moee.interface.watch import watched
from moee.methods.heads.fit import BATCH, Bases, HeadMoments, find_bases, narrowed, refit_projection
from moee.methods.heads.widths import check_reach, choose_widths, full_widths, moves
from moee.mlps.attention import NarrowAttention, Widths, find_attentions, input_shapes
from moee.models.ffn import channels_last
from moee.models.model import Shape, replace_module
from moee.parallel.devices import CPU, placed
from moee.progress import Reporter, silent, track
from moee.train.step import distillation_loss, token_loss

NUMBERS = 120_000 * 384  # tokens times their width in the fit, which holds all of a layer's inputs at once
TOKENS = 120_000  # a layer of the fit
TRIAL = 3  # times fewer tokens make the moments with which widths are tried
PROBES = 48  # images on which each width of each layer is tried; none of those with which it was made
PROBE_NUMBERS = 1 << 28  # inputs of all blocks on the probes


class _NarrowStep(nn.Module):
    """Stands where a narrowed attention will be for one forward pass: makes it from the pass's own input, then applies it."""

    def __init__(self, name: str, attention: Attention, widths: Widths, scale: Tensor | None, prefix: int):
        super().__init__()
        self.name, self.attention, self.widths, self.scale, self.prefix = name, attention, widths, scale, prefix
        self.made: NarrowAttention | None = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        assert attn_mask is None and not is_causal, "calibration images come without masks"
        moments, scale = HeadMoments(self.attention, self.prefix), None if self.scale is None else self.scale.to(x.device)
        reads = [moments.add(part) for part in x.split(BATCH)]
        _require_finite(self.name, moments)
        self.made = narrowed(self.attention, find_bases(moments, scale), self.widths, moments)
        refit_projection(self.made, self.attention, x, self.prefix, reads=reads)
        return torch.cat([self.made(part) for part in x.split(BATCH)])


class _Skip(nn.Module):
    """A block that passes its input on."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x


@torch.no_grad()
def narrow(
    model: nn.Module, data: ImageSet, shape: Shape, share: float, equal: bool = False, *, report: Reporter = silent,
    losses: dict[tuple[str, Widths], float] | None = None, device: torch.device = CPU, probes: int = PROBES,
    tokens: int = TOKENS,
) -> dict[str, Widths]:  # fmt: skip
    """Replace the attentions of `model` in place by narrower ones that keep the share `share` of the attention's MACs.

    `data` is the calibration set, of images of `shape`; with `equal` a layer's queries, keys and values get as many
    dimensions. A layer is fitted on about `tokens` of its tokens, but at most `NUMBERS`. `losses`, of `width_losses` for the same
    model, data and number of `probes`, serve every share; None measures them. Returns the widths
    of the layers that changed. Deterministic for one data set and thread count. Raises `UserError` for a model whose attentions
    cannot be narrowed, too small a share, fewer than two images or broken activations. Memory grows with `NUMBERS`: the inputs of
    a layer for all images of the fit, and its hidden activations. The model comes and goes on the CPU, in eval mode; the work is
    done on `device`.
    """
    model.eval()
    attentions = find_attentions(model)
    shapes = input_shapes(model, attentions, shape)
    check_reach(attentions, shapes, share)
    if losses is None:
        losses = width_losses(model, data, shape, equal, report, device=device, probes=probes, tokens=tokens)
    _, images = _images(data, *_numbers(attentions, shapes), probes, tokens)
    chosen = choose_widths(attentions, shapes, losses, share, equal)
    steps = {
        name: _NarrowStep(name, attentions[name], widths, _scale(model, name), prefix_tokens(model))
        for name, widths in chosen.items()
        if widths != full_widths(attentions[name])
    }
    for name, step in steps.items():
        replace_module(model, name, step)
    with placed(model, device):
        try:
            model(images.to(device))
        finally:
            for name in steps:
                replace_module(model, name, attentions[name])
        for name, step in steps.items():
            assert step.made is not None, f"{name} took no part in the forward pass"
            replace_module(model, name, step.made)
    return {name: step.widths for name, step in steps.items()}


@torch.no_grad()
def width_losses(
    model: nn.Module, data: ImageSet, shape: Shape, equal: bool = False, report: Reporter = silent, *, device: torch.device = CPU,
    probes: int = PROBES, tokens: int = TOKENS,
) -> dict[tuple[str, Widths], float]:  # fmt: skip
    """What `narrow` chooses widths by: the loss of the output with one attention, by its name, narrowed to each width.

    Arguments, errors and memory are those of `narrow`. Each width is made from the moments of a third of the tokens and
    tried on `probes` other images. The model stays as it is, in eval mode.
    """
    model.eval()
    attentions = find_attentions(model)
    shapes = input_shapes(model, attentions, shape)
    an_image, dim, layers = _numbers(attentions, shapes)
    tried, images = _images(data, an_image, dim, layers, probes, tokens)
    few = images[: max(2, tokens // TRIAL // an_image)]
    with placed(model, device):
        return _losses(model, attentions, tried.to(device), few.to(device), equal, report)


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


def _losses(
    model: nn.Module, attentions: dict[str, Attention], probes: Tensor, images: Tensor, equal: bool, report: Reporter
) -> dict[tuple[str, Widths], float]:
    """Loss of the model's output on `probes`, one layer at a time narrowed to each of its `moves` by the moments of `images`."""
    moments = {name: HeadMoments(attention, prefix_tokens(model)) for name, attention in attentions.items()}
    with watched(model, attentions, lambda name, x: moments[name].add(x)):
        parts = images.split(BATCH)
        for part in track(parts, "attention", len(parts), report):
            model(part)
    for name, found in moments.items():
        _require_finite(name, found)
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


