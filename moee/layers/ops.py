"""The torch operators `moee::experts` and `moee::ffn`: a routed feed-forward network that groups tokens by expert.

`moee::experts` takes the routes as an input, so that the backward pass has those of the forward pass whatever the arithmetic
around it; it works under autograd and `torch.compile`. `moee::ffn` finds the routes itself: it is what `torch.export` traces,
and `plugins.contract` defines what it computes. It has no gradient. Autocast ends at both: they compute in the types that come.
Routing is piecewise constant, so the router gets no gradient.

Here both run expert by expert, and the host waits for the device once a layer to learn how many tokens each expert has. `provide`
takes an implementation of `moee::ffn` that does not wait; layers then use it wherever no gradient is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moee.layers.activations import find_activation
from moee.layers.routing import exact_arithmetic, route

STORE = "Tensor w_up, Tensor b_up, Tensor w_down, Tensor b_out, Tensor neurons, Tensor offsets, str activation"
FFN = f"(Tensor x, Tensor router, Tensor router_bias, {STORE}, int top_k, int max_width, int[] load) -> Tensor"
EXPERTS = f"(Tensor x, Tensor routes, {STORE}) -> Tensor"
WHOLE: set[str] = set()  # types of devices for which `provide` was called
EXPERTS_BACKWARD = f"(Tensor grad, Tensor x, Tensor routes, {STORE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"


class Store(NamedTuple):
    """What the experts of a layer share, and which neurons each keeps; as in `plugins.contract`, and in the order of `STORE`."""

    w_up: Tensor
    b_up: Tensor
    w_down: Tensor
    b_out: Tensor
    neurons: Tensor
    offsets: Tensor
    activation: str

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is trained: `w_up`, `b_up`, `w_down` and `b_out`."""
        return self[:4]

    def to(self, dtype: torch.dtype) -> Store:
        """With the weights in another type."""
        w_up, b_up, w_down, b_out = (weight.to(dtype) for weight in self.weights)
        return Store(w_up, b_up, w_down, b_out, self.neurons, self.offsets, self.activation)


def _groups(chosen: Tensor, experts: int) -> list[Tensor]:
    """Rows of chosen [T, top_k] that picked each expert: K tensors of ascending token positions, int64."""
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    return list((order // chosen.shape[1]).split(counts))


def expert_rows(routes: Tensor, neurons: Tensor, offsets: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that some token takes: its number, the ascending rows of routes [T, top_k] that name it, and the neurons of the
    store that it keeps; both int64."""
    bounds = offsets.tolist()
    for e, rows in enumerate(_groups(routes, len(bounds) - 1)):
        if len(rows):
            yield e, rows, neurons[bounds[e] : bounds[e + 1]].long()


def _check_routes(x: Tensor, routes: Tensor, store: Store) -> None:
    w_up, offsets, (k, d) = store.w_up, store.offsets, store.b_out.shape
    tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if x.shape[-1] != d or w_up.shape[1] != d or routes.dim() != 2 or len(routes) != tokens or len(offsets) != k + 1:
        raise ValueError(
            f"moee::experts: expected x [..., {d}], routes [{tokens}, top_k], w_up [U, {d}] and {k + 1} offsets; "
            f"came {list(x.shape)}, {list(routes.shape)}, {list(w_up.shape)} and {len(offsets)}"
        )


def _check(x: Tensor, router: Tensor, router_bias: Tensor, store: Store, top_k: int) -> None:
    w_up, b_out, offsets, (k, d) = store.w_up, store.b_out, store.offsets, router.shape
    if x.shape[-1] != d or w_up.shape[1] != d or b_out.shape != (k, d) or router_bias.shape != (k,):
        raise ValueError(
            f"moee::ffn: expected x [..., {d}], w_up [U, {d}], router_bias [{k}] and b_out [{k}, {d}]; "
            f"came {list(x.shape)}, {list(w_up.shape)}, {list(router_bias.shape)}, {list(b_out.shape)}"
        )
    if len(offsets) != k + 1 or not 1 <= top_k <= k:
        raise ValueError(f"moee::ffn: expected {k + 1} offsets and top_k in 1..{k}; came {len(offsets)} and {top_k}")


def _forward(x: Tensor, routes: Tensor, store: Store) -> Tensor:
    tokens, top_k = x.reshape(-1, x.shape[-1]), routes.shape[1]
    act = find_activation(store.activation)
    exact = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(tokens.shape, dtype=exact if top_k > 1 else x.dtype, device=x.device)
    with exact_arithmetic(x.device):
        for e, rows, kept in expert_rows(routes, store.neurons, store.offsets):
            hidden = act.forward(torch.addmm(store.b_up[kept], tokens[rows], store.w_up[kept].T))
            part = torch.addmm(store.b_out[e], hidden, store.w_down[kept])
            if top_k == 1:
                y[rows] = part
            else:
                y[rows] += part.to(exact)
    return y.to(x.dtype).reshape(x.shape)


def check_ffn(x: Tensor, router: Tensor, router_bias: Tensor, *others: Any) -> None:
    """Raise `ValueError` unless the shapes of the arguments of `ffn` fit one another."""
    *stored, top_k, _, _ = others
    _check(x, router, router_bias, Store(*stored), top_k)


def ffn_by_groups(x: Tensor, router: Tensor, router_bias: Tensor, *others: Any) -> Tensor:
    """What `ffn` computes for x [..., D], expert by expert, on any device and for every type. Raises `ValueError` as
    `check_ffn`."""
    check_ffn(x, router, router_bias, *others)
    *stored, top_k, _, _ = others  # the widest expert and the load are for plugins
    return _forward(x, route(x.reshape(-1, x.shape[-1]), router, router_bias, top_k), Store(*stored))


@torch.library.custom_op("moee::ffn", mutates_args=(), schema=FFN)
def ffn(x: Tensor, router: Tensor, router_bias: Tensor, *others: Any) -> Tensor:
    """x [..., D] to y [..., D]; arguments as in `plugins.contract`. Sums in float32 (float64 for
    a float64 x), result in x's dtype."""
    return ffn_by_groups(x, router, router_bias, *others)


@ffn.register_fake
def _(x, *others):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def provide(device: str, kernel: Callable[..., Tensor]) -> None:
    """Let `kernel`, which takes the arguments of `ffn`, compute it on devices of the type `device`, such as `cuda`.

    It must not wait for the device. Layers take it where no gradient is needed; a second call replaces the first.
    """
    ffn.register_kernel(device)(kernel)
    WHOLE.add(device)


@torch.library.custom_op("moee::experts", mutates_args=(), schema=EXPERTS)
def experts(x: Tensor, routes: Tensor, *stored: Any) -> Tensor:
    """x [..., D] to y [..., D] by `routes` [tokens, top_k] int64, each in 0..K-1; the others are those of a `Store`."""
    store = Store(*stored)
    _check_routes(x, routes, store)
    return _forward(x, routes, store)


@experts.register_fake
def _(x, routes, *stored):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("moee::experts_backward", mutates_args=(), schema=EXPERTS_BACKWARD)
def experts_backward(grad: Tensor, x: Tensor, routes: Tensor, *stored: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_up, b_up, w_down and b_out, in their shapes and types, from `grad` and x [..., D] and routes [N, k]; what
    experts share is summed in float32. Hidden activations are computed again, not stored."""
    store = Store(*stored)
    tokens, upstream = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    act = find_activation(store.activation)
    exact = torch.promote_types(x.dtype, torch.float32)
    g_x, g_up, g_b, g_down, g_out = (torch.zeros_like(t, dtype=exact) for t in (tokens, *store.weights))
    with exact_arithmetic(x.device):  # the engine runs this under whatever autocast is on where backward() is called
        for e, rows, kept in expert_rows(routes, store.neurons, store.offsets):
            inputs, outputs, up, down = tokens[rows], upstream[rows], store.w_up[kept], store.w_down[kept]
            before = torch.addmm(store.b_up[kept], inputs, up.T)
            g_before = act.gradient(outputs @ down.T, before)
            g_x[rows] += g_before @ up
            g_up[kept] += g_before.T @ inputs
            g_b[kept] += g_before.sum(0, dtype=exact)
            g_down[kept] += act.forward(before).T @ outputs
            g_out[e] = outputs.sum(0, dtype=exact)
    g_up, g_b, g_down, g_out = (g.to(of.dtype) for g, of in zip((g_up, g_b, g_down, g_out), store.weights, strict=True))
    return g_x.to(x.dtype).reshape(x.shape), g_up, g_b, g_down, g_out


@experts_backward.register_fake
def _(grad, x, routes, *stored):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *stored[:4]))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    g_x, g_up, g_b, g_down, g_out = experts_backward(grad.contiguous(), *ctx.saved_tensors, ctx.activation)
    return g_x, None, g_up, g_b, g_down, g_out, None, None, None


experts.register_autograd(_backward, setup_context=_save)
