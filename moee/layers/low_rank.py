"""The low-rank MLP as a module: each of its two linear maps is a product of two smaller ones. There is nothing to route.

An export holds the four products (`exporter.passes.low_rank`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moee.errors import UserError
from moee.layers.activations import activate, find_activation
from moee.layers.routed import RoutedLayer

NAMES = ("up_in", "up_out", "up_bias", "down_in", "down_out", "down_bias")


def weight_shapes(dim: int, hidden: int, ranks: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of a `LowRankFFN`'s tensors; `ranks` are those of the up and the down map."""
    up, down = ranks
    shapes = ((up, dim), (up, hidden), (hidden,), (down, hidden), (down, dim), (dim,))
    return dict(zip(NAMES, shapes, strict=True))


@dataclass(frozen=True)
class LowRankWeights:
    """What a `LowRankFFN` computes with, float32: up map x -> `up_out`' (`up_in` x) + `up_bias` with `up_in` [r, D], `up_out`
    [r, H], `up_bias` [H], and the down map in the same way with `down_in` [r2, H], `down_out` [r2, D], `down_bias` [D]."""

    up_in: Tensor
    up_out: Tensor
    up_bias: Tensor
    down_in: Tensor
    down_out: Tensor
    down_bias: Tensor


class LowRankFFN(RoutedLayer):
    """Takes the place of an fc1-act-fc2 MLP on [..., D] (or [B, D, H, W] with `channels_first`); tensors as in `LowRankWeights`.

    To evaluation and parity it is a layer of one expert, which every token takes. Raises `UserError` for shapes that do not fit.
    """

    up_in: nn.Parameter
    up_out: nn.Parameter
    up_bias: nn.Parameter
    down_in: nn.Parameter
    down_out: nn.Parameter
    down_bias: nn.Parameter
    router = None
    top_k = 1

    def __init__(self, weights: LowRankWeights, activation: str, channels_first: bool = False):
        super().__init__()
        self.activation, self.channels_first = find_activation(activation).name, channels_first
        for name in NAMES:
            setattr(self, name, nn.Parameter(getattr(weights, name).detach().clone().float()))
        for name, shape in weight_shapes(self.dim, self.hidden, self.ranks).items():
            if (came := tuple(getattr(self, name).shape)) != shape:
                raise UserError(f"low-rank layer: {name} should have shape {list(shape)}, came {list(came)}")

    @property
    def num_experts(self) -> int:
        return 1

    @property
    def dtype(self) -> torch.dtype:
        return self.up_in.dtype

    @property
    def dim(self) -> int:
        return self.up_in.shape[1]

    @property
    def hidden(self) -> int:
        return self.up_out.shape[1]

    @property
    def ranks(self) -> tuple[int, int]:
        """Of the up and the down map."""
        return len(self.up_in), len(self.down_in)

    @property
    def widths(self) -> list[int]:
        """Hidden neurons of a dense MLP of equal MACs."""
        return [round(self.macs_per_token() / (2 * self.dim))]

    @property
    def union(self) -> int:
        """Hidden neurons of a dense MLP of equally many weights, which are as many as the MACs a token."""
        return self.widths[0]

    def macs_per_token(self, share: Sequence[float] | Tensor = ()) -> float:
        """The four products; there is nothing to route."""
        return float(sum(self.ranks) * (self.dim + self.hidden))

    def routes(self, x: Tensor) -> Tensor:
        """Expert 0 [tokens, 1] int64 for every token."""
        x = x.movedim(1, -1) if self.channels_first else x
        return torch.zeros(x.numel() // x.shape[-1], 1, dtype=torch.int64, device=x.device)

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_first:
            x = x.movedim(1, -1).contiguous()
        y = self.products(x)
        return y.movedim(-1, 1) if self.channels_first else y

    def products(self, tokens: Tensor) -> Tensor:
        """The layer on tokens [..., D]."""
        compute = low_rank_ffn if torch.compiler.is_exporting() else _forward
        up, down = (self.up_in, self.up_out, self.up_bias), (self.down_in, self.down_out, self.down_bias)
        return compute(tokens, *up, *down, self.activation)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden={self.hidden}, ranks={self.ranks}, activation={self.activation}"


def _forward(
    x: Tensor, up_in: Tensor, up_out: Tensor, up_bias: Tensor, down_in: Tensor, down_out: Tensor, down_bias: Tensor,
    activation: str,
) -> Tensor:  # fmt: skip
    linear = nn.functional.linear
    hidden = activate(linear(linear(x, up_in), up_out.T, up_bias), activation)
    return linear(linear(hidden, down_in), down_out.T, down_bias)


@torch.library.custom_op("moee::low_rank_ffn", mutates_args=())
def low_rank_ffn(
    x: Tensor,
    up_in: Tensor,
    up_out: Tensor,
    up_bias: Tensor,
    down_in: Tensor,
    down_out: Tensor,
    down_bias: Tensor,
    activation: str,
) -> Tensor:
    """x [..., D] to y [..., D]: what the exporter traces, so that the layer stays one node until it is lowered to products."""
    return _forward(x, up_in, up_out, up_bias, down_in, down_out, down_bias, activation)


@low_rank_ffn.register_fake
def _(x, up_in, up_out, up_bias, down_in, down_out, down_bias, activation):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
