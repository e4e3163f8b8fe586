"""The identity check: a model whose parts are replaced by ones that keep everything must still be the dense model.

Run before anything is cut. It is what makes reading other people's models safe: whatever was read wrongly, a layer's function,
its place or its layout, shows here as another output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from moee.cures import cures, without
from moee.errors import UserError
from moee.interface.adapted import title_of_model
from moee.layers.routed import Experts, NeuronLayer, RoutedFFN
from moee.methods.neurons.gated_pruning import whole as whole_gated
from moee.mlps.attention import NarrowAttention, Widths
from moee.mlps.proof import disagreement
from moee.mlps.sites import mlp_module, mlp_replaced
from moee.models.ffn import FFN
from moee.models.model import replace_module
from moee.progress import Reporter, silent
from moee.schema import reason_of
from moee.tokens.block import install_merging, plain_blocks

IMAGES = 2  # a check needs
NOISE = 1000  # times the dense model's own noise, which is the effect of rounding its input: room for other orders of summing
LIMIT = 1e-2  # of the output's root mean square, whatever the noise
ROUNDING = 4  # units in the last place of an attention's summands; see `moee.mlps.proof.ROUNDING`


@dataclass(frozen=True)
class _StandIn:
    """What takes the place of a module, and how far apart two outputs for an input are (1: as far as rounding may bring them).
    `bypassed`: see `FFN`."""

    module: nn.Module
    distance: Callable[[Tensor, Tensor, Tensor], float]
    bypassed: tuple[str, ...] = ()


class _WholeFFN(nn.Module):
    """`whole_ffn` of an MLP, made where it runs: a second copy of all MLPs would be gigabytes of a large model."""

    def __init__(self, ffn: FFN):
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor, *more: object, **named: object) -> Tensor:
        output: Tensor = whole_ffn(self.ffn)(x, *more, **named)
        return output

    def __getattr__(self, name: str) -> Any:
        """What a block around it asks for, the layer in its place will have too."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "ffn":
                raise
            return getattr(whole_ffn(self.ffn), name)


def whole_ffn(ffn: FFN) -> NeuronLayer:
    """Two experts that keep every neuron, and a router that sends tokens to both; a gated MLP with every neuron."""
    if ffn.gated:
        return whole_gated(ffn).eval()
    hidden = ffn.hidden
    direction = torch.randn(ffn.dim, generator=torch.Generator().manual_seed(0))
    neurons = torch.arange(hidden, dtype=torch.int32)
    experts = Experts(
        router=torch.stack([direction, -direction]), router_bias=torch.zeros(2), w_up=ffn.w_up, b_up=ffn.b_up,
        w_down=ffn.w_down.T, b_out=torch.stack([ffn.b_down, ffn.b_down]), neurons=torch.cat([neurons, neurons]),
        offsets=torch.tensor([0, hidden, 2 * hidden], dtype=torch.int32), activation=ffn.activation,
    )  # fmt: skip
    return RoutedFFN(experts, ffn.channels_first).eval()


def whole_attention(attention: Attention) -> NarrowAttention:
    """Timm's attention written as a narrowed one that keeps every dimension."""
    heads, width, dim = attention.num_heads, attention.head_dim, attention.qkv.in_features
    made = NarrowAttention(dim, heads, width, Widths(width, width))
    weight = attention.qkv.weight.detach().view(3, heads * width, dim)
    offset = weight.new_zeros(3, heads * width) if attention.qkv.bias is None else attention.qkv.bias.detach().view(3, -1)
    with torch.no_grad():
        made.q.weight.copy_(weight[0] * attention.scale)
        made.q.bias.copy_(offset[0] * attention.scale)
        made.k.weight.copy_(weight[1])
        made.v.weight.copy_(weight[2])
        made.v.bias.copy_(offset[2])
        made.proj.weight.copy_(attention.proj.weight)
        made.proj.bias.copy_(torch.zeros(dim) if attention.proj.bias is None else attention.proj.bias)
    return made.eval()


def check_ffns(model: nn.Module, ffns: Sequence[FFN], images: Tensor, report: Reporter = silent) -> None:
    """Raise `UserError` that names the layer unless `model`, its MLPs `ffns` replaced by experts that keep every neuron, gives
    the dense output on `images` [B, C, H, W]. Two forward passes; takes memory for a second copy of one MLP. `model` stays as it
    is.
    """
    stand_ins = {ffn.name: _StandIn(_WholeFFN(ffn), partial(disagreement, ffn), ffn.bypassed) for ffn in ffns}
    _check(model, stand_ins, images, "experts that keep every neuron", without("{}"), report)


def check_attentions(model: nn.Module, attentions: Mapping[str, Attention], images: Tensor, report: Reporter = silent) -> None:
    """As `check_ffns`, for attentions rewritten with every dimension of their heads."""
    stand_ins = {}
    for name, attention in attentions.items():
        made = whole_attention(attention)
        stand_ins[name] = _StandIn(made, partial(_attention_distance, made))
    cure = cures("leave --attention-macs out", elsewhere="choose another model")
    _check(model, stand_ins, images, "heads that keep every dimension", cure, report)


@torch.no_grad()
def check_merging(model: nn.Module, images: Tensor, report: Reporter = silent) -> None:
    """Raise `UserError` unless `model` gives the dense output on `images` [B, C, H, W] where every block matches its tokens,
    merges none of them, and goes on with them in the order of the matching. Two forward passes. `model` stays as it is."""
    report("identity check", 0, 2)
    dense, bound = dense_output(model, images)
    report("identity check", 1, 2)
    blocks = {f"blocks.{at}": block for at, block in enumerate(plain_blocks(model))}
    try:
        install_merging(model, [0] * len(blocks), every=True)
        apart = worst((output_of_batch(model, images) - dense).abs())
    finally:
        for name, block in blocks.items():
            replace_module(model, name, block)
    if not apart <= bound:
        raise UserError(
            f"blocks that merge no tokens do not give the dense output, the difference is {apart / bound:.2g} times what "
            "rounding can make; leave token merging out"
        )
    report("identity check", 2, 2)


def _attention_distance(made: NarrowAttention, x: Tensor, output: Tensor, expected: Tensor) -> float:
    """Largest difference of two outputs of attention for x [B, N, D], in units of what rounding may make of it."""
    read = made.v(x).abs().amax(1, keepdim=True)
    summands = nn.functional.linear(read, made.proj.weight.abs(), made.proj.bias.abs())
    q, k = (part(x).unflatten(-1, (made.heads, -1)).transpose(1, 2) for part in (made.q, made.k))
    logits = 1 + float((q @ k.mT).abs().max())  # an exponent's error is its result's
    bound = ROUNDING * torch.finfo(x.dtype).eps * summands * logits + torch.finfo(torch.float32).tiny
    return worst((output - expected).abs() / bound)


def worst(values: Tensor) -> float:
    """The maximum; NaN counts as infinite."""
    most = float(values.max())
    return most if most == most else float("inf")


@torch.no_grad()
def _check(
    model: nn.Module, stand_ins: Mapping[str, _StandIn], images: Tensor, what: str, cure: str, report: Reporter
) -> None:  # fmt: skip
    report("identity check", 0, 2)
    dense, bound = dense_output(model, images)
    report("identity check", 1, 2)
    wrong: dict[str, float] = {}
    try:
        with _replaced(model, stand_ins, wrong):
            apart = worst((output_of_batch(model, images) - dense).abs())
    except (UserError, MemoryError):
        raise
    except Exception:  # a parent may want what only the original has
        apart = float("inf")
    if not wrong and not apart <= bound:  # whose doing is it?
        for name, stand_in in stand_ins.items():
            try:
                with _replaced(model, {name: stand_in}, wrong):
                    alone = worst((output_of_batch(model, images) - dense).abs())
            except (UserError, MemoryError):
                raise
            except Exception as error:  # as above
                reason = reason_of(error)
                raise UserError(f"`{name}` cannot be replaced by {what} ({reason}); {cure.format(name)}") from error
            if not alone <= bound:
                wrong[name] = alone / bound
                break
    if not wrong and not apart <= bound:
        raise UserError(
            f"{what} do not give the dense output where all {len(stand_ins)} layers have them, though each alone does; the "
            f"difference is {apart / bound:.2g} times what rounding can make; choose another model"
        )
    for name, times in wrong.items():
        raise UserError(
            f"`{name}`: {what} do not give the dense output, the difference is {times:.2g} times what rounding can make; "
            f"{cure.format(name)}"
        )
    report("identity check", 2, 2)


def dense_output(model: nn.Module, images: Tensor, room: float = NOISE) -> tuple[Tensor, float]:
    """The model's output on `images` [B, C, H, W], and how far from it one that computes the same may lie: `room` times its own
    noise. Raises `UserError` for an output that is not finite."""
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rounded = images * (1 + torch.finfo(images.dtype).eps * signs)
    dense, twin = output_of_batch(model, torch.cat([images, rounded])).chunk(2)
    if not (torch.isfinite(dense).all() and torch.isfinite(twin).all()):
        raise UserError("the dense model's output on the data is NaN or infinite; check the weights and the input normalisation")
    size = float(dense.float().square().mean().sqrt())
    noise = float((dense - twin).abs().max())
    return dense, min(room * max(noise, torch.finfo(dense.dtype).eps * size), LIMIT * size)


def output_of_batch(model: nn.Module, images: Tensor) -> Tensor:
    """The output for images [B, C, H, W]. Raises `UserError` for a model that gives no tensor."""
    output = model(images)
    if not isinstance(output, Tensor):
        raise UserError(f"{title_of_model(model)} returns {type(output).__name__}, expected one tensor an image")
    return output


@contextmanager
def _replaced(model: nn.Module, stand_ins: Mapping[str, _StandIn], wrong: dict[str, float]) -> Iterator[None]:
    """The model with the stand-ins in it; those whose output is too far off are collected in `wrong`, in the order they ran."""

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            if any(value is not None and value is not False for value in (*args[1:], *kwargs.values())):
                raise UserError(f"`{name}` is called with more than its tokens, such as a mask; expected one tensor")
            distance = stand_ins[name].distance(args[0], output, originals[name](args[0]))
            if distance > 1:
                wrong.setdefault(name, distance)

        return see

    originals = {name: mlp_module(model, name, part.bypassed) for name, part in stand_ins.items()}
    handles = [part.module.register_forward_hook(hook(name), with_kwargs=True) for name, part in stand_ins.items()]
    try:
        with ExitStack() as stack:
            for name, part in stand_ins.items():
                stack.enter_context(mlp_replaced(model, name, part.module, part.bypassed))
            yield
    finally:
        for handle in handles:
            handle.remove()
