"""The CLEAR-MoE layer as a module: two low-rank maps, each a shared basis plus one small residual expert a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moee.errors import UserError
from moee.layers import clear_ops as ops
from moee.layers.activations import activate, find_activation
from moee.layers.clear_dispatch import Factors, apply_ffn, backend
from moee.layers.clear_routers import Router
from moee.layers.routed import RoutedLayer

PARTS = (
    "router", "router_bias", "router_hidden", "router_hidden_bias",
    "up_in", "up_out", "up_bias", "down_in", "down_out", "down_bias",
)  # fmt: skip


@dataclass(frozen=True)
class ClearParts:
    """Everything a CLEAR-MoE layer computes with."""

    router: Router
    up: Factors
    down: Factors
    activation: str


class ClearFFN(RoutedLayer):
    """Takes the place of an fc1-act-fc2 MLP on [..., D] (or [B, D, H, W] with `channels_first`).

    Parameters `up_in` [r + K q, D], `up_out` [r + K q, H], `up_bias` [K, H], `down_in` [r2 + K q2, H], `down_out`
    [r2 + K q2, D], `down_bias` [K, D]: shared rows first, then q rows an expert. Frozen: `router` [K, F]; buffers `router_bias`
    [K], `router_hidden` [F, D] (zero rows unless the router has two layers), `router_hidden_bias` [F]. `backend` is the
    dispatch of `forward`; it is not saved, all give the same result.
    """

    router: nn.Parameter
    router_bias: Tensor
    router_hidden: Tensor
    router_hidden_bias: Tensor
    up_in: nn.Parameter
    up_out: nn.Parameter
    up_bias: nn.Parameter
    down_in: nn.Parameter
    down_out: nn.Parameter
    down_bias: nn.Parameter

    def __init__(self, parts: ClearParts, channels_first: bool = False):
        super().__init__()
        self.activation, self.top_k = find_activation(parts.activation).name, 1
        self.channels_first, self.backend = channels_first, "sorted"
        self.ranks = (parts.up.rank, parts.up.residual, parts.down.rank, parts.down.residual)
        for name, factors in (("up", parts.up), ("down", parts.down)):
            self._check(name, factors, parts.router.experts)
            for side, tensor in (("in", factors.inward), ("out", factors.outward), ("bias", factors.bias)):
                setattr(self, f"{name}_{side}", nn.Parameter(tensor.detach().clone().float()))
        self.router = nn.Parameter(parts.router.rows.detach().clone().float(), requires_grad=False)
        self.register_buffer("router_bias", parts.router.bias.detach().clone().float())
        self.register_buffer("router_hidden", parts.router.hidden.detach().clone().float())
        self.register_buffer("router_hidden_bias", parts.router.hidden_bias.detach().clone().float())

    @staticmethod
    def _check(name: str, factors: Factors, experts: int) -> None:
        rows = factors.rank + experts * factors.residual
        if len(factors.inward) != rows or len(factors.outward) != rows or len(factors.bias) != experts:
            raise UserError(
                f"{name}: expected {rows} rows (rank {factors.rank}, {experts} experts of rank {factors.residual}) and "
                f"{experts} biases, came {len(factors.inward)}, {len(factors.outward)} and {len(factors.bias)}"
            )

    @property
    def num_experts(self) -> int:
        return self.router.shape[0]

    @property
    def dim(self) -> int:
        return self.up_in.shape[1]

    @property
    def hidden(self) -> int:
        return self.up_out.shape[1]

    def parts(self) -> ClearParts:
        """The layer's tensors, without copying."""
        r1, q1, r2, q2 = self.ranks
        return ClearParts(
            Router(self.router, self.router_bias, self.router_hidden, self.router_hidden_bias),
            Factors(self.up_in, self.up_out, self.up_bias, r1, q1),
            Factors(self.down_in, self.down_out, self.down_bias, r2, q2),
            self.activation,
        )

    def routes(self, x: Tensor) -> Tensor:
        """Experts [tokens, 1] int64 of the layer's input, tokens in reading order."""
        x = x.movedim(1, -1) if self.channels_first else x
        return self.parts().router.route(x.reshape(-1, x.shape[-1]))[:, None]

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_first:
            x = x.movedim(1, -1).contiguous()
        if torch.compiler.is_exporting():  # one node, which a graph pass lowers to the form that the target likes
            y = ops.clear_ffn(x, *(getattr(self, name) for name in PARTS), list(self.ranks), self.activation)
        else:
            y = self._dispatched(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        return y.movedim(-1, 1) if self.channels_first else y

    def _dispatched(self, tokens: Tensor) -> Tensor:
        parts = self.parts()
        with torch.no_grad():
            routes = parts.router.route(tokens)
        y = apply_ffn(tokens, routes, parts.up, parts.down, lambda h: activate(h, self.activation), via=backend(self.backend))
        if self.router.requires_grad and torch.is_grad_enabled():  # a gradient of the chosen expert's softmax share
            chosen = torch.softmax(parts.router.scores(tokens), -1).gather(1, routes[:, None])
            y = y * (chosen / chosen.detach())
        return y

    def rank_units(self, masked: bool = False) -> tuple[int, int]:
        """Rank-one terms a token pays in each map: r + q, or with plain masked products r + K q + K."""
        r1, q1, r2, q2 = self.ranks
        k = self.num_experts
        return (r1 + k * q1 + k, r2 + k * q2 + k) if masked else (r1 + q1, r2 + q2)

    def macs_per_token(self, share: Sequence[float] | Tensor = (), masked: bool = False) -> float:
        """Multiply-accumulates a token: the router and both maps. Experts are of equal rank, so `share` does not matter.

        `masked`: of the form without dispatch, which computes all experts' coefficients.
        """
        return self.parts().router.macs + float(sum(self.rank_units(masked)) * (self.dim + self.hidden))

    @property
    def widths(self) -> list[int]:
        """Hidden neurons of a dense MLP of equal MACs, an expert."""
        return [round(sum(self.rank_units()) * (self.dim + self.hidden) / (2 * self.dim))] * self.num_experts

    @property
    def union(self) -> int:
        """Hidden neurons of a dense MLP of equally many weights."""
        return round((len(self.up_in) + len(self.down_in)) * (self.dim + self.hidden) / (2 * self.dim))

    def extra_repr(self) -> str:
        r1, q1, r2, q2 = self.ranks
        return f"experts={self.num_experts}, up={r1}+{q1}, down={r2}+{q2}, activation={self.activation}"
