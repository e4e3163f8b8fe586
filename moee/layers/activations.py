"""The activations that a routed layer may have: one row each, by the name that the operator's contract gives it.

To add one: a row here, its name in `plugins/contract.py` and `plugins/csrc/operator/operator.h`, its form in
`plugins/kernels/common.py` and `exporter/passes/activation.py`. `tests/test_activations.py` fails until all five have it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moee.errors import chosen

QUICK = 1.702  # slope of quick_gelu (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016)
SAME = 1e-5  # of 1 + |y|; gelu and gelu_tanh, the closest rows, are 5e-4 apart


@dataclass(frozen=True)
class Activation:
    """An elementwise function of the hidden layer that leaves 0 as it is.

    `forward` takes x of any shape and float type. `gradient` takes the upstream gradient and x; it is spelt out because the body
    of a custom operator runs below autograd.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(QUICK * x)


def _quick_gelu_gradient(upstream: Tensor, x: Tensor) -> Tensor:
    share = torch.sigmoid(QUICK * x)
    return upstream * (share + QUICK * x * share * (1 - share))


_ROWS = (
    Activation("gelu", nn.functional.gelu, torch.ops.aten.gelu_backward),
    Activation(
        "gelu_tanh",
        lambda x: nn.functional.gelu(x, approximate="tanh"),
        lambda upstream, x: torch.ops.aten.gelu_backward(upstream, x, approximate="tanh"),
    ),
    Activation("relu", torch.relu, lambda upstream, x: torch.ops.aten.threshold_backward(upstream, x, 0)),
    Activation("silu", nn.functional.silu, torch.ops.aten.silu_backward),
    Activation("quick_gelu", _quick_gelu, _quick_gelu_gradient),
)
ACTIVATIONS: dict[str, Activation] = {row.name: row for row in _ROWS}
KNOWN = ", ".join(ACTIVATIONS)


def find_activation(name: str) -> Activation:
    """The row of this name. Raises `UserError` for an unknown one."""
    return chosen(ACTIVATIONS, name, "activation")


def activate(x: Tensor, name: str) -> Tensor:
    """Activation `name` of x, of any shape and type, elementwise. Raises `UserError` for an unknown name."""
    return find_activation(name).forward(x)


def activation_name(function: Callable[[Tensor], Tensor]) -> str | None:
    """Name of the row that `function`, mostly a module, computes; None if it is another function.

    Judged by its values on a grid, not by its class: every library has classes of its own. The grid reaches to +-10,000, so that
    clipped forms differ. What has parameters is none of ours: it may differ between channels.
    """
    if isinstance(function, nn.Module) and next(function.parameters(), None) is not None:
        return None
    far = torch.logspace(1, 4, 31)
    grid = torch.cat([-far.flip(0), torch.linspace(-9.875, 9.875, 1581), far])
    try:
        with torch.no_grad():
            values = function(grid.clone())  # some work in place
    except Exception:  # any code may stand behind it; what cannot take a vector is not elementwise
        return None
    if not isinstance(values, Tensor) or values.shape != grid.shape or not values.is_floating_point():
        return None
    for row in ACTIVATIONS.values():
        exact = row.forward(grid.double())
        if bool(((values.double() - exact).abs() <= SAME * (1 + exact.abs())).all()):
            return row.name
    return None
