"""What a share of neurons and of head dimensions costs, and which share meets a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from timm.layers import Attention
from torch import nn

from moee.errors import OutOfReach, UserError
from moee.measure.metrics import dense_macs, original_macs, tokens_per_image
from moee.methods.corp.options import CorpOptions
from moee.mlps.attention import Widths, attention_macs, find_attentions, input_shapes
from moee.mlps.find import find_ffns
from moee.models.ffn import FFN
from moee.models.model import Shape

STEPS = 30  # bisections of the share: finer than one neuron


@dataclass(frozen=True)
class Costs:
    """MLPs `ffns` with their `tokens` an image, `attentions` with their shapes, and MACs an image of the model as it is (`now`)
    and as a `whole`, before other steps."""

    ffns: Mapping[str, FFN]
    tokens: Mapping[str, int]
    attentions: Mapping[str, Attention]
    shapes: Mapping[str, tuple[int, int]]
    now: int
    whole: int

    @classmethod
    def of(cls, model: nn.Module, options: CorpOptions, shape: Shape) -> Costs:
        """Of a dense `model` on images of `shape`. Raises `UserError` for attention that cannot be cut."""
        ffns = {ffn.name: ffn for ffn in find_ffns(model, options.exclude, shape, gated=True).ffns}
        attentions = attentions_of(model) if options.corp_attention == "cut" else {}
        shapes = input_shapes(model, attentions, shape) if attentions else {}
        now, whole = dense_macs(model, shape), original_macs(model, shape)
        return cls(ffns, tokens_per_image(model, ffns, shape), attentions, shapes, now, whole)

    def macs(self, keep: float) -> int:
        """MACs an image of the model that keeps the share `keep`."""
        saved = 0
        for name, ffn in self.ffns.items():
            saved += self.tokens[name] * ffn.neuron_macs * (ffn.hidden - neurons_at(keep, ffn.hidden))
        for name, attention in self.attentions.items():
            dim, heads, head = attention.qkv.in_features, attention.num_heads, attention.head_dim
            full, cut = (
                attention_macs(dim, heads, Widths(width, head), *self.shapes[name]) for width in (head, dimensions_at(keep, head))
            )
            saved += full - cut
        return self.now - saved

    def keep_for(self, target: float) -> float:
        """The largest share that leaves `target` of the MACs. Raises `OutOfReach` where there is none."""
        low, high = 0.0, 1.0
        if (least := self.macs(low)) > target * self.whole:
            raise OutOfReach(
                f"--target-macs {target:g}: with one neuron an MLP and half of the heads' query and key dimensions "
                f"{least / self.whole:.2f} of the MACs are left; give more"
            )
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.macs(middle) <= target * self.whole else (low, middle)
        return low


def neurons_at(keep: float, hidden: int) -> int:
    """Neurons of an MLP that stay: one at least."""
    return max(1, round(keep * hidden))


def dimensions_at(keep: float, head_dim: int) -> int:
    """Query and key dimensions of a head that stay: half at least."""
    return max(-(-head_dim // 2), round(keep * head_dim))


def attentions_of(model: nn.Module) -> dict[str, Attention]:
    """The attentions that are cut. Raises `UserError` where there are others."""
    try:
        return find_attentions(model)
    except UserError as error:
        raise UserError(f"corp: {str(error).partition(';')[0]}; give --corp-attention whole") from error
