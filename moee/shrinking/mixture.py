"""A routed layer as the original of a smaller one, and what its experts compute on tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moee.layers.ops import expert_rows
from moee.layers.routed import LOAD_UNIT, Experts, RoutedFFN
from moee.space.limits import OUTPUTS

SUPER_SHARE, SUPER_RANK, SUPER_FACTOR = 0.1, 0.995, 10.0


@dataclass(frozen=True)
class Mixture:
    """A layer of experts by its path. Its output's bias lies in the experts: `b_down` [D] is zero."""

    name: str
    layer: RoutedFFN

    @property
    def dim(self) -> int:
        return self.layer.w_up.shape[1]

    @property
    def channels_first(self) -> bool:
        return self.layer.channels_first

    @property
    def b_down(self) -> Tensor:
        return torch.zeros(self.dim, device=self.layer.w_up.device)

    @property
    def scale(self) -> None:
        """What follows it was not looked at."""

    def target(self, tokens: Tensor) -> Tensor:
        """Outputs [n, D] for input tokens [n, D]."""
        return self.layer(tokens)

    def to(self, device: torch.device) -> Mixture:
        """The same with its tensors on `device`."""
        return Mixture(self.name, self.layer.to(device))

    def experts(self) -> list[Tensor]:
        """The stored neurons of each expert, ascending, int64."""
        return list(self.layer.neurons.long().split(self.layer.widths))

    def outputs(self, tokens: Tensor) -> Tensor:
        """Outputs [n, K, D] of every expert for tokens [n, D], whether they are sent to it or not."""
        layer = self.layer
        hidden = layer.activations(tokens, torch.arange(layer.union, device=tokens.device))
        every = [hidden[:, kept] @ layer.w_down[kept] + layer.b_out[e] for e, kept in enumerate(self.experts())]
        return torch.stack(every, 1)

    def sent(self, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Experts that some of tokens [n, D] is sent to first, and those tokens."""
        for e, rows, _ in expert_rows(self.layer.routes(tokens)[:, :1], self.layer.neurons, self.layer.offsets):
            yield e, tokens[rows]

    def chunks(self, tokens: Tensor) -> Sequence[Tensor]:
        """Parts of tokens [n, D] of which all experts' outputs fit into memory."""
        return tokens.split(max(1, OUTPUTS // (self.layer.num_experts * self.dim)))


@torch.no_grad()
def extremes(mixture: Mixture, tokens: Tensor) -> list[float]:
    """The largest absolute output of each expert on those of the tokens [n, D] that it is sent; 0 where it is sent none."""
    found = [0.0] * mixture.layer.num_experts
    kept = mixture.experts()
    for e, own in mixture.sent(tokens):
        y = mixture.layer.activations(own, kept[e]) @ mixture.layer.w_down[kept[e]] + mixture.layer.b_out[e]
        found[e] = float(y.abs().max())
    return found


def super_experts(largest: dict[str, list[float]]) -> dict[str, list[int]]:
    """Experts with extreme outputs, by layer; `largest` as `extremes` finds them.

    As in "Unveiling Super Experts in Mixture-of-Experts LLMs" (arXiv 2507.23279): the largest output exceeds the 99.5th
    percentile of all experts of the model, and a tenth of the largest of all. A model of few experts always has one such, so here
    it also exceeds ten times the median.
    """
    every = torch.tensor([value for values in largest.values() for value in values if value > 0], dtype=torch.float64)
    if not len(every):
        return {}
    ranked = float(every.quantile(SUPER_RANK))
    least = max(SUPER_SHARE * float(every.max()), SUPER_FACTOR * float(every.median()))
    found = {name: [e for e, v in enumerate(values) if v >= ranked and v > least] for name, values in largest.items()}
    return {name: experts for name, experts in found.items() if experts}


def assembled(
    mixture: Mixture, router: tuple[Tensor, Tensor], kept: Sequence[Tensor], b_out: Tensor, share: Tensor
) -> RoutedFFN:
    """A layer of the mixture's stored neurons `kept` [K lists, ascending] with that router and its biases, output biases [K, D]
    and shares [K] of the tokens. Neurons that no expert keeps leave the store; the others' weights stay as they are."""
    layer = mixture.layer
    union = torch.cat(list(kept)).unique()
    position = torch.full((layer.union,), -1, dtype=torch.int64)
    position[union] = torch.arange(len(union))
    made = Experts(
        router=router[0], router_bias=router[1], w_up=layer.w_up[union], b_up=layer.b_up[union], w_down=layer.w_down[union],
        b_out=b_out, neurons=torch.cat([position[each] for each in kept]).to(torch.int32),
        offsets=torch.tensor([0, *[len(each) for each in kept]]).cumsum(0).to(torch.int32), activation=layer.activation,
        top_k=layer.top_k, load=tuple((share.double() * LOAD_UNIT).round().long().tolist()),
    )  # fmt: skip
    smaller = RoutedFFN(made, layer.channels_first)
    smaller.bypassed = layer.bypassed
    smaller.router.requires_grad_(layer.router.requires_grad)
    return smaller
