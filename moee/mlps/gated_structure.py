"""What a module's parts say about whether it is a gated MLP, down(act(gate(x)) * up(x)), without running it.

Gate and up are two maps of one shape, or the halves of one. Which is which the parts do not show; `moee.mlps.find` finds it by
running the module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moee.mlps.gated import GATES, GatedMLP, gate_name

KNOWN_GATES = ", ".join(GATES)


def read_gated(
    name: str, module: nn.Module, maps: Mapping[str, Any], functions: Mapping[str, nn.Module], obstacle: str
) -> GatedMLP | str | None:
    """`module` as a gated MLP, a sentence about what speaks against it, or None if its maps do not have the shapes of one.

    `maps` are its linear maps in their order, `functions` its parts without parameters, `obstacle` what speaks against the maps
    themselves ("": nothing). Without a function among its parts, it computes one by itself, and any activation may be meant.
    """
    weights = [part.weight.detach() for part in maps.values()]
    halves = _halves(weights)
    if halves is None or re.search("attn|attention", type(module).__name__, re.IGNORECASE):
        return None
    if not functions and (obstacle or len({w.ndim for w in weights}) > 1):
        return None  # nothing but two or three maps and something else: it need not be an MLP
    if obstacle:
        return f"gated, and {obstacle}"
    if len({w.ndim for w in weights}) > 1:
        return "gated, and mixes linear maps and convolutions"
    if len(functions) > 1:
        listed = ", ".join(f"`{path}` ({type(part).__name__})" for path, part in functions.items())
        return f"gated, and holds {listed} beside its maps"
    function = next(iter(functions.values()), None)
    activation = gate_name(function) if function is not None else None
    if function is not None and activation is None and not _halves_input(function):
        return f"gated by {type(function).__name__}; known are {KNOWN_GATES}"
    gate, up, down = halves
    biases = [part.bias.detach() if part.bias is not None else part.weight.detach().new_zeros(len(part.weight))
              for part in maps.values()]  # fmt: skip
    width = down.shape[1]
    if len(weights) == 2:
        b_gate, b_up, b_down = biases[0][:width], biases[0][width:], biases[1]
    else:
        b_gate, b_up, b_down = (biases[_position(weights, part)] for part in (gate, up, down))
    first = next(iter(maps.values()))
    return GatedMLP(
        name=name,
        activation=activation or "silu",
        w_up=up.flatten(1),
        b_up=b_up,
        w_down=down.flatten(1),
        b_down=b_down,
        scale=None,
        channels_first=isinstance(first, nn.Conv2d),
        w_gate=gate.flatten(1),
        b_gate=b_gate,
        stored=sum(p.numel() for p in {id(p): p for part in maps.values() for p in part.parameters()}.values()),
        guesses=() if activation else tuple(GATES),
    )


def gated_width(maps: Mapping[str, Any]) -> int | None:
    """Hidden neurons of a gated MLP of these maps; None if they do not have the shapes of one."""
    halves = _halves([part.weight for part in maps.values()])
    return None if halves is None else int(halves[2].shape[1])


def _position(weights: list[Tensor], wanted: Tensor) -> int:
    return next(i for i, weight in enumerate(weights) if weight is wanted)


def _halves(weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gate, up and down (in some order of the first two) by the shapes of two or three weights; None if they do not fit."""
    if len(weights) == 2:
        both, down = weights
        dim, width = down.shape[:2]
        if both.shape[:2] != (2 * width, dim):
            return None
        return both[:width], both[width:], down
    if len(weights) != 3:
        return None
    for place in (2, 0, 1):
        down = weights[place]
        gate, up = weights[:place] + weights[place + 1 :]
        if gate.shape[:2] == up.shape[:2] == down.shape[:2][::-1]:
            return gate, up, down
    return None


def _halves_input(function: nn.Module) -> bool:
    """Whether a module without parameters gates its own input, as `torch.nn.GLU` does: it gives half as many numbers."""
    try:
        with torch.no_grad():
            given = function(torch.linspace(-1, 1, 12).reshape(2, 6))
    except Exception:  # any code may stand behind it
        return False
    return isinstance(given, Tensor) and given.shape == (2, 3)
