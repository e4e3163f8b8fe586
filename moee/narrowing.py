"""Fewer dimensions a head, in closed form: which directions of queries, keys and values the data needs, and in which layer.

Per head, with q and k [tokens, d] (k centred over an image's tokens, a constant that a softmax does not see), the error of the
dot products E (q.k - q'.k')^2 is least, for q and k drawn independently, with the leading singular vectors of
Cq^(1/2) Ck^(1/2), C being second moments. Values: the leading ones of P Cv^(1/2), P the head's part of the output projection
behind its LayerScale, Cv the covariance of what the head attends to. The output projection is then fitted by least squares to
the dense attention's output on the narrowed model's own inputs, front to back. The few tokens that are no patches (a class token
first of all) stand for much of the output and count for more in the sums over queries and outputs: each for PREFIX_SHARE of the
patches.

How many dimensions each layer keeps is measured: the loss of the model's output on calibration images with one layer narrowed
at a time, then steps of STEP dimensions where they cost least a MAC.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from timm.layers import Attention
from torch import Tensor, nn

from moee.attention import NarrowAttention, Widths, attention_macs, find_attentions, input_shapes
from moee.data import ImageSet, batches
from moee.errors import UserError
from moee.models import channels_last, replace_module
from moee.progress import Reporter, silent, track
from moee.training import distillation_loss, token_loss

STEP = 8  # dimensions: what tensor cores and fused attention want multiples of
LEAST = 0.5  # share of a head's dimensions that stays, at least
NUMBERS = 120_000 * 384  # tokens times their width in the fit, which holds all of a layer's inputs at once
TRIAL_TOKENS = 40_000  # for the moments with which widths are tried
PROBES = 48  # images on which each width of each layer is tried; none of those with which it was made
PROBE_NUMBERS = 1 << 28  # inputs of all blocks on the probes
BATCH = 16  # images a product
PREFIX_SHARE = 1 / 8
RIDGE = 1e-6  # of the mean diagonal: the fit has hundreds of tokens a weight, this is for rank-deficient values only
FLOOR = 1e-8  # of the largest eigenvalue


class Moments:
    """Second moments of an attention's queries and keys [heads, d, d], mean and covariance of what its projection reads.

    The first `prefix` tokens of an image are no patches."""

    def __init__(self, attention: Attention, prefix: int = 0):
        heads, dim = attention.num_heads, attention.head_dim
        self.attention, self.prefix, self.count = attention, prefix, 0.0
        self.query = torch.zeros(heads, dim, dim, dtype=torch.float64)
        self.key = torch.zeros_like(self.query)
        self.read = torch.zeros(heads * dim, heads * dim, dtype=torch.float64)
        self.total = torch.zeros(heads * dim, dtype=torch.float64)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """See tokens [B, N, D]."""
        q, k, read = dense_parts(self.attention, x)
        weight = token_weights(x.shape[1], self.prefix)
        k = k - k.mean(2, keepdim=True)
        self.query += torch.einsum("bhnd,bhne->hde", q * weight[:, None], q)
        self.key += torch.einsum("bhnd,bhne->hde", k, k)
        weighed = read * weight.repeat(len(x))[:, None]
        self.read += weighed.T @ read
        self.total += weighed.sum(0)
        self.count += float(weight.sum()) * len(x)

    @property
    def covariance(self) -> Tensor:
        mean = self.total / self.count
        return self.read / self.count - torch.outer(mean, mean)


def token_weights(count: int, prefix: int) -> Tensor:
    """What each of an image's `count` tokens [count] counts for; 1 for a patch."""
    weights = torch.ones(count)
    weights[:prefix] = max(1.0, (count - prefix) * PREFIX_SHARE)
    return weights


def dense_parts(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key [B, heads, N, d] of tokens [B, N, D], and what the output projection reads, [B N, heads * d]."""
    images, count = x.shape[:2]
    q, k, v = attention.qkv(x).view(images, count, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    seen = nn.functional.scaled_dot_product_attention(q, k, v)
    return q, k, seen.transpose(1, 2).reshape(images * count, -1)


def _roots(second: Tensor) -> tuple[Tensor, Tensor]:
    """C^(1/2) and C^(-1/2) of symmetric matrices [..., d, d]."""
    values, vectors = torch.linalg.eigh(second)
    values = values.clamp(min=FLOOR * float(values.max().clamp(min=1e-30))).sqrt().unsqueeze(-2)
    return vectors * values @ vectors.mT, vectors / values @ vectors.mT


@dataclass(frozen=True)
class Bases:
    """Maps [heads, d, d] of a head's query, key and value to coordinates in which the leading ones matter most."""

    query: Tensor
    key: Tensor
    value: Tensor


def find_bases(moments: Moments, scale: Tensor | None) -> Bases:
    """The best coordinates; `scale` [D] is the LayerScale behind the attention."""
    attention = moments.attention
    heads, dim = attention.num_heads, attention.head_dim
    query, query_inverse = _roots(moments.query / moments.count)
    key, key_inverse = _roots(moments.key / moments.count)
    left, strength, right = torch.linalg.svd(query @ key)
    root = strength.sqrt().unsqueeze(-1)
    diagonal = moments.covariance.view(heads, dim, heads, dim).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    value, value_inverse = _roots(diagonal)
    weight = attention.proj.weight.double()
    weight = weight if scale is None else weight * scale.double()[:, None]
    # the right singular vectors of W C^(1/2), from a square matrix: W has more rows than a head has dimensions
    by_head = weight.view(-1, heads, dim).transpose(0, 1) @ value
    directions = torch.linalg.eigh(by_head.mT @ by_head).eigenvectors.flip(-1)
    return Bases(root * left.mT @ query_inverse, root * right @ key_inverse, directions.mT @ value_inverse)


def narrowed(attention: Attention, bases: Bases, widths: Widths, moments: Moments) -> NarrowAttention:
    """`attention` with `widths` a head; its output projection is the least-squares one for what the moments saw."""
    heads, dim = attention.num_heads, attention.head_dim
    weight = attention.qkv.weight.double().view(3, heads, dim, -1)
    bias = attention.qkv.bias
    offset = torch.zeros(3, heads, dim).double() if bias is None else bias.double().view(3, heads, dim)
    query, key, value = bases.query[:, : widths.qk] * attention.scale, bases.key[:, : widths.qk], bases.value[:, : widths.v]
    made = NarrowAttention(weight.shape[-1], heads, dim, widths)
    pairs = [(made.q, query, 0), (made.k, key, 1), (made.v, value, 2)]
    for linear, basis, part in pairs:
        linear.weight.data = (basis @ weight[part]).flatten(0, 1).float()
        if linear.bias is not None:
            linear.bias.data = (basis @ offset[part].unsqueeze(-1)).flatten().float()
    reduce = torch.block_diag(*value)
    covariance, mean = moments.covariance, moments.total / moments.count
    dense = attention.proj.weight.double()
    fitted = _solve(reduce @ covariance @ reduce.T, reduce @ covariance @ dense.T).T
    made.proj.weight.data = fitted.float()
    own = 0 if attention.proj.bias is None else attention.proj.bias.double()
    made.proj.bias.data = (own + dense @ mean - fitted @ (reduce @ mean)).float()
    return made.eval()


def _solve(gram: Tensor, cross: Tensor) -> Tensor:
    system = gram.clone()
    system.diagonal().add_(RIDGE * system.diagonal().mean().clamp(min=1e-30))
    return torch.linalg.solve(system, cross)


def refit_projection(made: NarrowAttention, attention: Attention, x: Tensor, prefix: int = 0) -> None:
    """Fit `made.proj` by least squares to the dense `attention`'s output on tokens [B, N, D]."""
    width, dim = made.proj.in_features, made.proj.out_features
    gram, cross = torch.zeros(width, width).double(), torch.zeros(width, dim).double()
    read_sum, target_sum = torch.zeros(width).double(), torch.zeros(dim).double()
    weights = token_weights(x.shape[1], prefix)
    for part in x.split(BATCH):
        read = made.attend(part).flatten(0, 1)
        target = attention.proj(dense_parts(attention, part)[2])
        weight = weights.repeat(len(part))[:, None]
        weighed = read * weight
        gram += weighed.T @ read
        cross += weighed.T @ target
        read_sum += weighed.sum(0, dtype=torch.float64)
        target_sum += (target * weight).sum(0, dtype=torch.float64)
    count = float(weights.sum()) * len(x)
    read_mean, target_mean = read_sum / count, target_sum / count
    fitted = _solve(gram / count - torch.outer(read_mean, read_mean), cross / count - torch.outer(read_mean, target_mean)).T
    made.proj.weight.data = fitted.float()
    made.proj.bias.data = (target_mean - fitted @ read_mean).float()


class _NarrowStep(nn.Module):
    """Stands where a narrowed attention will be for one forward pass: makes it from the pass's own input, then applies it."""

    def __init__(self, attention: Attention, widths: Widths, scale: Tensor | None, prefix: int):
        super().__init__()
        self.attention, self.widths, self.scale, self.prefix = attention, widths, scale, prefix
        self.made: NarrowAttention | None = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        assert attn_mask is None and not is_causal, "calibration images come without masks"
        moments = Moments(self.attention, self.prefix)
        for part in x.split(BATCH):
            moments.add(part)
        self.made = narrowed(self.attention, find_bases(moments, self.scale), self.widths, moments)
        refit_projection(self.made, self.attention, x, self.prefix)
        return torch.cat([self.made(part) for part in x.split(BATCH)])


class _Skip(nn.Module):
    """A block that passes its input on."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x


@torch.no_grad()
def narrow(
    model: nn.Module, data: ImageSet, size: int, share: float, equal: bool = False, report: Reporter = silent
) -> dict[str, Widths]:
    """Replace the attentions of `model` in place by narrower ones that keep the share `share` of the attention's MACs.

    `data` is the calibration set, of images of `size` pixels; with `equal` a layer's queries, keys and values get as many
    dimensions. Returns the widths of the layers that changed. Deterministic for one data set and thread count. Raises `UserError`
    for a model whose attentions cannot be narrowed, too small a share, fewer than two images or broken activations. Memory grows
    with `NUMBERS`: the inputs of a layer for all images of the fit, and its hidden activations. Leaves the model in eval mode.
    """
    model.eval()
    attentions = find_attentions(model)
    shapes = input_shapes(model, attentions, size)
    check_share(model, size, share)
    per_image = max(images * tokens for images, tokens in shapes.values())
    probes, images = _images(data, per_image, next(iter(attentions.values())).qkv.in_features, len(attentions))
    losses = _losses(model, attentions, probes, images[: max(2, TRIAL_TOKENS // per_image)], equal, report)
    chosen = choose_widths(attentions, shapes, losses, share, equal)
    steps = {
        name: _NarrowStep(attentions[name], widths, _scale(model, name), _prefix(model))
        for name, widths in chosen.items()
        if widths != _whole(attentions[name])
    }
    for name, step in steps.items():
        replace_module(model, name, step)
    try:
        model(images)
    finally:
        for name in steps:
            replace_module(model, name, attentions[name])
    for name, step in steps.items():
        assert step.made is not None, f"{name} took no part in the forward pass"
        replace_module(model, name, step.made)
    return {name: step.widths for name, step in steps.items()}


def _images(data: ImageSet, tokens: int, dim: int, layers: int) -> tuple[Tensor, Tensor]:
    """Images to try widths on, and others to fit with, both drawn over all readable ones of `data`."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    probes = min(PROBES, max(4, PROBE_NUMBERS // (layers * tokens * dim)))
    fit = max(4, NUMBERS // (tokens * dim))
    images = torch.cat([batch.images for batch in batches(data, BATCH, order=order[: probes + fit])])
    if len(images) < 2:
        raise UserError(f"--attention-macs needs at least 2 readable images, came {len(images)}; add some or leave it out")
    probes = min(probes, len(images) // 2)
    return images[:probes], images[probes:]


def _prefix(model: nn.Module) -> int:
    """Tokens of an image, the first ones, that are no patches."""
    return int(getattr(model, "num_prefix_tokens", 0) or 0)


def _whole(attention: Attention) -> Widths:
    return Widths(attention.head_dim, attention.head_dim)


def _scale(model: nn.Module, name: str) -> Tensor | None:
    """Weight [D] of the LayerScale behind an attention, if there is one."""
    block = model.get_submodule(name.rpartition(".")[0])
    gamma = getattr(getattr(block, "ls1", None) or getattr(block, "ls", None), "gamma", None)  # `ls`: timm's parallel blocks
    return gamma.detach().flatten() if isinstance(gamma, Tensor) else None


def levels(head_dim: int) -> list[int]:
    """Dimensions to try, from all of them down to LEAST, in multiples of STEP."""
    first = (head_dim - 1) // STEP * STEP
    return [head_dim, *range(first, max(STEP, -(-int(LEAST * head_dim) // STEP) * STEP) - 1, -STEP)]


def moves(head_dim: int, equal: bool) -> list[Widths]:
    """The widths whose loss is measured: query and key alone, values alone; or both as one, where they are to be equal."""
    narrower = levels(head_dim)[1:]
    if equal:
        return [Widths(width, width) for width in narrower]
    return [Widths(width, head_dim) for width in narrower] + [Widths(head_dim, width) for width in narrower]


def check_share(model: nn.Module, size: int, share: float) -> None:
    """Raise `UserError` if the attentions of `model`, on images of `size` pixels, cannot be narrowed to `share` of their MACs."""
    attentions = find_attentions(model)
    shapes = input_shapes(model, attentions, size)
    narrowest = {name: levels(attention.head_dim)[-1] for name, attention in attentions.items()}
    low = sum(_macs(a, Widths(narrowest[n], narrowest[n]), shapes[n]) for n, a in attentions.items())
    least = low / sum(_macs(a, _whole(a), shapes[n]) for n, a in attentions.items())
    if share < least * (1 - 1e-9):
        raise UserError(
            f"--attention-macs {share:g}: heads keep at least half of their dimensions, in multiples of {STEP}, so give "
            f"{math.ceil(least * 100) / 100:.2f} or more"
        )


def _macs(attention: Attention, widths: Widths, shape: tuple[int, int]) -> int:
    return attention_macs(attention.qkv.in_features, attention.num_heads, widths, *shape)


def _losses(
    model: nn.Module, attentions: dict[str, Attention], probes: Tensor, images: Tensor, equal: bool, report: Reporter
) -> dict[tuple[str, Widths], float]:
    """Loss of the model's output on `probes`, one layer at a time narrowed to each of its `moves` by the moments of `images`."""
    moments = {name: Moments(attention, _prefix(model)) for name, attention in attentions.items()}
    with _watched(model, attentions, lambda name, x: moments[name].add(x)):
        parts = images.split(BATCH)
        for part in track(parts, "attention", len(parts), report):
            model(part)
    for name, found in moments.items():
        if not all(torch.isfinite(t).all() for t in (found.query, found.key, found.read)):
            raise UserError(
                f"`{name}` receives NaN or infinite activations on the calibration data; check the weights and the input "
                "normalisation"
            )
    inputs: dict[str, Tensor] = {}
    first = {name.rpartition(".")[0]: name for name in attentions}  # the block of each attention
    with _watched(model, first, lambda block, x: inputs.__setitem__(first[block], x)):
        features = model.forward_features(probes)  # type: ignore[operator]
    reference = model.forward_head(features), channels_last(features, model)  # type: ignore[operator]
    classifier = bool(getattr(model, "num_classes", 0))
    tried = [(name, widths) for name, a in attentions.items() for widths in moves(a.head_dim, equal)]
    losses = {}
    bases: tuple[str, Bases] | None = None
    for name, widths in track(tried, "attention widths", len(tried), report):
        if bases is None or bases[0] != name:
            bases = name, find_bases(moments[name], _scale(model, name))
        with _standing_in(model, name, narrowed(attentions[name], bases[1], widths, moments[name]), inputs[name]):
            features = model.forward_features(probes)  # type: ignore[operator]
        output, last = model.forward_head(features), channels_last(features, model)  # type: ignore[operator]
        loss = distillation_loss(output, reference[0], classifier) + token_loss(last, reference[1])
        losses[name, widths] = float(loss)
    return losses


@contextmanager
def _watched(model: nn.Module, names, see) -> Iterator[None]:
    """Call `see` with each named module's name and input."""
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: see(name, args[0])) for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def choose_widths(
    attentions: dict[str, Attention], shapes: dict[str, tuple[int, int]], losses: dict[tuple[str, Widths], float],
    share: float, equal: bool,
) -> dict[str, Widths]:  # fmt: skip
    """Widths whose MACs are at most `share` of all: the cheapest loss a MAC first, over one or several steps."""
    current = {name: _whole(attention) for name, attention in attentions.items()}
    whole = sum(_macs(a, current[name], shapes[name]) for name, a in attentions.items())
    total = whole

    def loss(name: str, widths: Widths) -> float:
        """Losses of query with key and of values are taken to add up."""
        full = attentions[name].head_dim
        if equal:
            return losses.get((name, widths), 0.0)
        return losses.get((name, Widths(widths.qk, full)), 0.0) + losses.get((name, Widths(full, widths.v)), 0.0)

    while total > share * whole * (1 + 1e-9):
        best: tuple[float, str, Widths] | None = None
        for name, attention in attentions.items():
            now = current[name]
            for width in levels(attention.head_dim):
                if equal:
                    options = [Widths(width, width)]
                else:
                    options = [replace(now, qk=min(width, now.qk)), replace(now, v=min(width, now.v))]
                for option in options:
                    freed = _macs(attention, now, shapes[name]) - _macs(attention, option, shapes[name])
                    if freed > 0:
                        price = (loss(name, option) - loss(name, now)) / freed
                        best = min(best or (price, name, option), (price, name, option), key=lambda item: item[0])
        assert best is not None, "check_share saw that the share can be met"
        _, name, option = best
        total -= _macs(attentions[name], current[name], shapes[name]) - _macs(attentions[name], option, shapes[name])
        current[name] = option
    return current
