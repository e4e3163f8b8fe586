"""The torch operator `moee::clear_ffn`: what the exporter traces, so that a CLEAR-MoE layer stays one node until lowered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moee.layers.activations import activate
from moee.layers.clear_dispatch import Factors, Masked, apply_ffn
from moee.layers.clear_routers import Router


@torch.library.custom_op("moee::clear_ffn", mutates_args=())
def clear_ffn(
    x: Tensor,
    router: Tensor,
    router_bias: Tensor,
    router_hidden: Tensor,
    router_hidden_bias: Tensor,
    up_in: Tensor,
    up_out: Tensor,
    up_bias: Tensor,
    down_in: Tensor,
    down_out: Tensor,
    down_bias: Tensor,
    ranks: Sequence[int],
    activation: str,
) -> Tensor:
    """x [..., D] to y [..., D]; arguments as in `ClearFFN`, ranks [r1, q1, r2, q2]."""
    tokens = x.reshape(-1, x.shape[-1])
    routes = Router(router, router_bias, router_hidden, router_hidden_bias).route(tokens)
    up, down = Factors(up_in, up_out, up_bias, *ranks[:2]), Factors(down_in, down_out, down_bias, *ranks[2:])
    return apply_ffn(tokens, routes, up, down, lambda h: activate(h, activation), via=Masked()).reshape(x.shape)


@clear_ffn.register_fake
def _(x, router, router_bias, router_hidden, router_hidden_bias, up_in, up_out, up_bias, down_in, down_out, down_bias,
      ranks, activation):  # fmt: skip
    return torch.empty_like(x, memory_format=torch.contiguous_format)
