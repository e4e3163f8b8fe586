"""Attention with fewer dimensions a head: the module, and what it saves.

Query and key of a head meet only in their dot product, value and output projection only in their matrix product, so each pair
can be written with fewer dimensions without another change to the model. `moee.methods.narrowing` chooses how many.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from timm.layers import Attention
from torch import Tensor, nn

from moee.errors import UserError
from moee.interface.adapted import title_of_model
from moee.interface.watch import shapes_given
from moee.mlps.structure import HOOKED, hooked
from moee.models.model import Shape


@dataclass(frozen=True)
class Widths:
    """Dimensions a head of query and key, and of the values."""

    qk: int
    v: int


class NarrowAttention(nn.Module):
    """Takes the place of timm's `Attention` on tokens [B, N, D], with `widths` dimensions in each of `heads` heads.

    `head_dim` is what the original had. The scale of the dot products is part of the query's weights; the key has no bias, which
    a softmax would not see.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, widths: Widths):
        super().__init__()
        self.dim, self.heads, self.head_dim, self.widths = dim, heads, head_dim, widths
        self.q = nn.Linear(dim, heads * widths.qk)
        self.k = nn.Linear(dim, heads * widths.qk, bias=False)
        self.v = nn.Linear(dim, heads * widths.v)
        self.proj = nn.Linear(heads * widths.v, dim)

    def attend(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """What the output projection reads: [B, N, heads * v]."""
        images, count = x.shape[:2]
        q, k, v = (
            part(x).view(images, count, self.heads, width).transpose(1, 2)
            for part, width in ((self.q, self.widths.qk), (self.k, self.widths.qk), (self.v, self.widths.v))
        )
        seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=1.0)
        return seen.transpose(1, 2).reshape(images, count, self.heads * self.widths.v)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.proj(self.attend(x, attn_mask, is_causal))


def find_attentions(model: nn.Module) -> dict[str, Attention]:
    """Every attention of the model that can be narrowed: timm's plain one, without norms or gates inside.

    Attention pooling at the head of a model is left aside. Raises `UserError` that names the first of another kind, or if there
    is none.
    """
    found: dict[str, Attention] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if type(module) is Attention:
            what = obstacle(module) or (HOOKED if hooked(module) else "")
            if what:
                raise UserError(f"heads of `{name}` cannot be narrowed, it {what}; leave --attention-macs out")
            found[name] = module
        elif re.search("attn|attention", kind, re.IGNORECASE) and "Pool" not in kind:
            raise UserError(f"only timm's plain Attention can be narrowed, and `{name}` is {kind}; leave --attention-macs out")
    if not found:
        raise UserError(f"{title_of_model(model)} has no attention that can be narrowed; leave --attention-macs out")
    return found


def obstacle(attention: Attention) -> str:
    """Why a plain attention cannot be narrowed, if so. Older versions of timm lack some of these parts."""
    for part in ("q_norm", "k_norm", "norm"):
        if not isinstance(getattr(attention, part, None), (nn.Identity, type(None))):
            return f"has a {part}"
    if getattr(attention, "gate", None) is not None:
        return "has a gate"
    if attention.attn_drop.p or attention.proj_drop.p:
        return "has dropout"
    return "changes the width of its tokens" if attention.proj.out_features != attention.qkv.in_features else ""


def mean_key_map(attention: nn.Module) -> tuple[Tensor, Tensor]:
    """The map of a token to the mean over the heads of its keys: weight [d, D] and bias [d]. Of timm's plain attention, or a
    narrowed one; raises `UserError` that says why another has none."""
    if isinstance(attention, NarrowAttention):
        weight = attention.k.weight.unflatten(0, (attention.heads, -1)).mean(0)
        return weight, weight.new_zeros(len(weight))
    if type(attention) is not Attention:
        raise UserError(f"is {type(attention).__name__}, and not timm's plain Attention")
    if what := obstacle(attention):
        raise UserError(what)
    parts = (3, attention.num_heads, -1)
    weight, bias = attention.qkv.weight.unflatten(0, parts)[1].mean(0), attention.qkv.bias
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.unflatten(0, parts)[1].mean(0)


def pair_macs(attention: nn.Module) -> int:
    """Multiply-accumulates of a pair of tokens in the two products of tokens with tokens, where there is a `mean_key_map`."""
    if isinstance(attention, NarrowAttention):
        return attention.heads * (attention.widths.qk + attention.widths.v)
    return 2 * int(attention.num_heads) * int(attention.head_dim)  # type: ignore[arg-type]


def narrow_attentions(model: nn.Module) -> dict[str, NarrowAttention]:
    """The narrowed attentions of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NarrowAttention)}


def attention_macs(dim: int, heads: int, widths: Widths, images: int, tokens: int) -> int:
    """Multiply-accumulates on [images, tokens, dim]: four projections and two products of tokens with tokens."""
    return images * tokens * heads * (widths.qk + widths.v) * (2 * dim + tokens)


def input_shapes(model: nn.Module, names: Iterable[str], shape: Shape) -> dict[str, tuple[int, int]]:
    """(images, tokens) that each named attention sees of one image of `shape`. Works on shapes alone."""
    return {name: (given[0], given[1]) for name, given in shapes_given(model, names, shape).items()}


def narrowing_costs(model: nn.Module, dense: nn.Module, shape: Shape) -> dict[str, tuple[NarrowAttention, int, int]]:
    """The narrowed attentions of `model` with their multiply-accumulates an image before and after. `dense`, the model before,
    shows how many tokens they see."""
    layers = narrow_attentions(model)
    costs = {}
    for name, tokens in (input_shapes(dense, layers, shape) if layers else {}).items():
        layer = layers[name]
        before, after = (
            attention_macs(layer.dim, layer.heads, widths, *tokens)
            for widths in (Widths(layer.head_dim, layer.head_dim), layer.widths)
        )
        costs[name] = (layer, before, after)
    return costs


def macs_saved(model: nn.Module, shape: Shape, dense: nn.Module | None = None) -> int:
    """Multiply-accumulates an image that the narrowed attentions of `model` save. `dense` shows the shapes where `model` has
    routed layers, which cannot be run on shapes alone."""
    return sum(before - after for _, before, after in narrowing_costs(model, dense or model, shape).values())
