"""Blocks of a Vision Transformer that merge tokens between attention and MLP, in the place of timm's.

Sizes go along with the tokens from block to block: their logarithm is added to the attention's logits, so that a token that
stands for several counts for as many (proportional attention). Behind the last block every patch is at its own place again, so
that pooling, heads and features of patches are as before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from moee.errors import UserError
from moee.interface.adapted import on_meta, title_of_model
from moee.mlps.attention import mean_key_map
from moee.mlps.structure import HOOKED, hooked
from moee.models.model import replace_module
from moee.tokens.merge import Merged, TokenMerge, restored

CURE = "leave token merging out"
PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


class MergingBlock(nn.Module):
    """timm's `Block` with its own parts, which takes tokens [B, N, D] or `Merged`, and gives `Merged`, or all tokens of the image
    again [B, N, D] if it is the `last`. `merge` is None for a block that merges nothing itself."""

    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: nn.Module, merge: TokenMerge | None, prefix: int, last: bool):
        super().__init__()
        self.prefix, self.last = prefix, last
        for name in PARTS:
            setattr(self, name, getattr(block, name))
        self.merge = merge
        self.train(block.training)

    def forward(self, given: Tensor | Merged) -> Tensor | Merged:
        x, size, place = given if isinstance(given, Merged) else Merged(given)
        h = self.norm1(x)
        bias = None if size is None else size.log().to(x.dtype)[:, None, None]
        x = x + self.drop_path1(self.ls1(self.attn(h, attn_mask=bias)))
        done = Merged(x, size, place)
        if self.merge is not None:
            done = self.merge(h, done)
        done = done._replace(x=done.x + self.drop_path2(self.ls2(self.mlp(self.norm2(done.x)))))
        return restored(done, self.prefix) if self.last else done


def merging_blocks(model: nn.Module) -> dict[str, MergingBlock]:
    """The merging blocks of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MergingBlock)}


def token_merges(model: nn.Module) -> dict[str, TokenMerge]:
    """What merges tokens in a model, by the block's name."""
    return {name: block.merge for name, block in merging_blocks(model).items() if block.merge is not None}


def merged_tokens(model: nn.Module) -> list[int]:
    """How many tokens each block of a model merges; empty for a model that merges none."""
    if not merging_blocks(model):
        return []
    merges = (getattr(block, "merge", None) for block in model.blocks)  # type: ignore[union-attr]
    return [0 if merge is None else merge.merged for merge in merges]


def plain_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model that tokens can be merged in: those of timm's VisionTransformer, with its plain attention.

    Raises `UserError` that says why another model's cannot."""
    if type(model) is not VisionTransformer:
        raise UserError(
            f"tokens are merged in timm's VisionTransformer alone, and this is {title_of_model(model)}; {CURE}"
        )
    blocks = list(model.blocks)
    for at, block in enumerate(blocks):
        if type(block) is not Block:
            raise UserError(f"tokens are merged in timm's plain Block alone, and `blocks.{at}` is {type(block).__name__}; {CURE}")
        if hooked(block, inside=False):
            raise UserError(f"tokens cannot be merged in `blocks.{at}`, it {HOOKED}; {CURE}")
        try:
            mean_key_map(block.attn)
        except UserError as error:
            raise UserError(f"tokens cannot be merged beside `blocks.{at}.attn`, it {error}; {CURE}") from error
    if not blocks:
        raise UserError(f"the model has no blocks to merge tokens in; {CURE}")
    return blocks


@torch.no_grad()
def install_merging(model: nn.Module, merged: Sequence[int], *, every: bool = False) -> None:
    """Put merging blocks into `model` in place, so that block i merges `merged[i]` tokens. Blocks before the first that merges
    stay as they are; with `every` all match, those that merge none as well. Raises `UserError` as `plain_blocks`, and for another
    number of blocks."""
    blocks, prefix = plain_blocks(model), int(model.num_prefix_tokens)  # type: ignore[arg-type]
    if len(merged) != len(blocks):
        raise UserError(f"the model has {len(blocks)} blocks, and {len(merged)} numbers of merged tokens came; give one a block")
    first = next((at for at, count in enumerate(merged) if count or every), len(blocks))
    for at in range(first, len(blocks)):
        block = blocks[at]
        merge = TokenMerge(*mean_key_map(block.attn), merged[at], prefix) if merged[at] or every else None  # type: ignore[arg-type]
        replace_module(model, f"blocks.{at}", MergingBlock(block, merge, prefix, at == len(blocks) - 1))


def without_merging(model: nn.Module) -> nn.Module:
    """The model as it was before tokens were merged, by its shapes alone; itself if none are."""
    if not merging_blocks(model):
        return model
    shadow = on_meta(model)
    for block in merging_blocks(shadow).values():
        block.merge = None
    return shadow


def merging_like(dense: nn.Module, model: nn.Module) -> nn.Module:
    """The `dense` model with the token merging of `model`, which was made from it, by its shapes alone; itself without any."""
    counts = merged_tokens(model)
    if not counts:
        return dense
    shadow = on_meta(dense)
    install_merging(shadow, counts)
    for name, merge in token_merges(model).items():
        shadow.get_submodule(name).merge = on_meta(merge)  # narrower heads have narrower keys
    return shadow
