"""The torch operator `moee::ffn`: a routed feed-forward network that groups tokens by expert.

It works under autograd, `torch.compile` and `torch.export`; `plugins.contract` defines what it computes.
Routing is piecewise constant, so the router gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moee.activations import find_activation
from moee.routing import route

SCHEMA = (
    "(Tensor x, Tensor router, Tensor router_bias, Tensor w_up, Tensor b_up, Tensor w_down, Tensor b_out, Tensor neurons, "
    "Tensor offsets, str activation, int top_k, int max_width, int[] load) -> Tensor"
)


def _groups(chosen: Tensor, experts: int) -> list[Tensor]:
    """Rows of chosen [T, top_k] that picked each expert: K tensors of ascending token positions, int64."""
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    return list((order // chosen.shape[1]).split(counts))


def _check(x: Tensor, router: Tensor, router_bias: Tensor, w_up: Tensor, b_out: Tensor, offsets: Tensor, top_k: int) -> None:
    k, d = router.shape
    if x.shape[-1] != d or w_up.shape[1] != d or b_out.shape != (k, d) or router_bias.shape != (k,):
        raise ValueError(
            f"moee::ffn: expected x [..., {d}], w_up [U, {d}], router_bias [{k}] and b_out [{k}, {d}]; "
            f"came {list(x.shape)}, {list(w_up.shape)}, {list(router_bias.shape)}, {list(b_out.shape)}"
        )
    if len(offsets) != k + 1 or not 1 <= top_k <= k:
        raise ValueError(f"moee::ffn: expected {k + 1} offsets and top_k in 1..{k}; came {len(offsets)} and {top_k}")


@torch.library.custom_op("moee::ffn", mutates_args=(), schema=SCHEMA)
def ffn(
    x: Tensor,
    router: Tensor,
    router_bias: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    w_down: Tensor,
    b_out: Tensor,
    neurons: Tensor,
    offsets: Tensor,
    activation: str,
    top_k: int,
    max_width: int,
    load: Sequence[int],
) -> Tensor:
    """x [..., D] to y [..., D]; arguments as in `plugins.contract`. Sums in float32 (float64 for
    a float64 x), result in x's dtype."""
    _check(x, router, router_bias, w_up, b_out, offsets, top_k)
    tokens = x.reshape(-1, x.shape[-1])
    act, bounds = find_activation(activation), offsets.tolist()
    exact = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(tokens.shape, dtype=exact if top_k > 1 else x.dtype, device=x.device)
    for e, rows in enumerate(_groups(route(tokens, router, router_bias, top_k), router.shape[0])):
        if not len(rows):
            continue
        kept = neurons[bounds[e] : bounds[e + 1]]
        hidden = act.forward(torch.addmm(b_up[kept], tokens[rows], w_up[kept].T))
        part = torch.addmm(b_out[e], hidden, w_down[kept])
        if top_k == 1:
            y[rows] = part
        else:
            y[rows] += part.to(exact)
    return y.to(x.dtype).reshape(x.shape)


@ffn.register_fake
def _(x, router, router_bias, w_up, b_up, w_down, b_out, neurons, offsets, activation, top_k, max_width, load):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("moee::ffn_backward", mutates_args=())
def ffn_backward(
    grad: Tensor,
    x: Tensor,
    router: Tensor,
    router_bias: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    w_down: Tensor,
    b_out: Tensor,
    neurons: Tensor,
    offsets: Tensor,
    activation: str,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_up, b_up, w_down and b_out. Hidden activations are computed again, not stored."""
    tokens, upstream = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    act, bounds = find_activation(activation), offsets.tolist()
    g_x, g_up, g_down = torch.zeros_like(tokens), torch.zeros_like(w_up), torch.zeros_like(w_down)
    g_b, g_out = torch.zeros_like(b_up), torch.zeros_like(b_out)
    for e, rows in enumerate(_groups(route(tokens, router, router_bias, top_k), router.shape[0])):
        if not len(rows):
            continue
        kept = neurons[bounds[e] : bounds[e + 1]].long()
        inputs, outputs, up, down = tokens[rows], upstream[rows], w_up[kept], w_down[kept]
        before = torch.addmm(b_up[kept], inputs, up.T)
        g_before = act.gradient(outputs @ down.T, before)
        g_x[rows] += g_before @ up
        g_up[kept] += g_before.T @ inputs
        g_b[kept] += g_before.sum(0)
        g_down[kept] += act.forward(before).T @ outputs
        g_out[e] = outputs.sum(0)
    return g_x.reshape(x.shape), g_up, g_b, g_down, g_out


@ffn_backward.register_fake
def _(grad, x, router, router_bias, w_up, b_up, w_down, b_out, neurons, offsets, activation, top_k):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w_up, b_up, w_down, b_out))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.activation, ctx.top_k, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    g_x, g_up, g_b, g_down, g_out = ffn_backward(grad.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.top_k)
    return g_x, None, None, g_up, g_b, g_down, g_out, None, None, None, None, None, None


ffn.register_autograd(_backward, setup_context=_save)
