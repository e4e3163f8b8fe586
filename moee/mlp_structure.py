"""What a module's parts say about whether it is an MLP, down(act(up(x))), without running it.

A candidate is the innermost module that holds two linear maps (or 1x1 convolutions) and something without parameters that could
be their activation, whatever these are called. `moee.mlps` proves by running them what this file takes for MLPs.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from timm.layers import DropPath
from torch import nn

from moee.activations import KNOWN, activation_name
from moee.errors import UserError
from moee.models import FFN
from moee.schema import shown

INERT = (nn.Identity, DropPath, nn.modules.dropout._DropoutNd)  # pass their input on in eval mode


@dataclass(frozen=True)
class Dense:
    """A candidate that stays dense: why, and the width of its hidden layer."""

    reason: str
    hidden: int


def read_mlp(model: nn.Module, name: str) -> FFN:
    """The module `name` as an MLP, by structure alone. Raises `UserError` with the reason if it is none."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"{type(model).__name__} has no module {shown(name)}") from None
    found = read_module(name, module)
    if isinstance(found, FFN):
        return found
    reason = found.reason if found else "it does not hold two linear maps and an activation"
    raise UserError(f"`{name}` is no plain MLP: {reason}")


def candidates(model: nn.Module) -> dict[str, FFN | Dense]:
    """Every innermost module that holds two linear maps and an activation, as an MLP or with what speaks against it."""
    found: dict[str, FFN | Dense] = {}
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, module in model.named_modules():
        if not name or not (read := read_module(name, module)):
            continue
        if isinstance(read, FFN) and any(owners[id(p)] > 1 for p in module.parameters()):
            read = Dense("shares weights with another module", read.hidden)
        found[name] = read
    return found


def _is_map(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return set(module.kernel_size) == {1} and module.groups == 1
    return isinstance(module, nn.Linear)


def _is_plain(module: nn.Module) -> bool:
    """Whether a map is computed as torch does; subclasses may standardise or mask their weights first."""
    if isinstance(module, nn.Conv2d) and (set(module.stride) != {1} or module.padding not in ((0, 0), "same", "valid")):
        return False
    return type(module).forward in (nn.Linear.forward, nn.Conv2d.forward) and "forward" not in vars(module)


def read_module(name: str, module: nn.Module) -> FFN | Dense | None:
    """`module` as an MLP, with what speaks against it, or None if it is nothing like one."""
    leaves = {path: part for path, part in module.named_modules() if path and next(part.children(), None) is None}
    maps = {path: part for path, part in leaves.items() if _is_map(part)}
    functions = {
        path: part for path, part in leaves.items()
        if path not in maps and not isinstance(part, INERT)
        and (isinstance(part, nn.PReLU) or not [*part.parameters(), *part.buffers()])
    }  # fmt: skip
    gated = len(maps) == 3 and sum("." not in path for path in maps) >= 2
    if not functions or (len(maps) != 2 and not gated) or _within_one_child(maps):
        return None
    (up_path, up), (down_path, down), *_ = maps.items()
    hidden = int(up.weight.shape[0])
    obstacle = "holds three linear maps" if gated else _obstacle(module, maps, functions)
    if obstacle:
        looks_like_attention = re.search("attn|attention", type(module).__name__, re.IGNORECASE)
        return None if looks_like_attention else Dense(obstacle, hidden)
    w_up, w_down = up.weight.detach().flatten(1), down.weight.detach().flatten(1)
    activation = activation_name(next(iter(functions.values())))
    assert activation is not None, "_obstacle saw that it is known"
    return FFN(
        name=name,
        activation=activation,
        w_up=w_up,
        b_up=up.bias.detach() if up.bias is not None else w_up.new_zeros(w_up.shape[0]),
        w_down=w_down,
        b_down=down.bias.detach() if down.bias is not None else w_down.new_zeros(w_down.shape[0]),
        scale=None,
        channels_first=isinstance(up, nn.Conv2d),
        biases=(up.bias is not None, down.bias is not None),
    )


def _within_one_child(maps: dict[str, nn.Module]) -> bool:
    """Whether a part of the module holds all of its maps already."""
    firsts = {path.split(".")[0] for path in maps}
    return len(firsts) == 1


def _obstacle(module: nn.Module, maps: dict[str, Any], functions: dict[str, nn.Module]) -> str:
    """What keeps a module of two maps from being down(act(up(x))), as far as its parts show it."""
    inside = {id(t) for part in maps.values() for t in (part.weight, part.bias) if t is not None}
    for path, part in module.named_modules():
        if any(id(t) not in inside for t in (*part._parameters.values(), *part._buffers.values()) if t is not None):
            what = f"`{path}` ({type(part).__name__})" if path else "parameters of its own"
            return f"holds {what} beside its two linear maps"
    (up_path, up), (down_path, down) = maps.items()
    for path, part in maps.items():
        if not _is_plain(part):
            return f"`{path}` is {type(part).__name__}, no plain linear map"
    if type(up.weight) is not type(down.weight) or up.weight.ndim != down.weight.ndim:
        return "mixes linear maps and convolutions"
    if len(functions) > 1:
        return f"holds {', '.join(f'`{path}` ({type(part).__name__})' for path, part in functions.items())} beside its two maps"
    if up.weight.shape[0] != down.weight.shape[1]:
        return f"gated: `{up_path}` gives {up.weight.shape[0]} numbers and `{down_path}` takes {down.weight.shape[1]}"
    if up.weight.shape[1] != down.weight.shape[0]:
        return f"changes the width of its tokens from {up.weight.shape[1]} to {down.weight.shape[0]}"
    act = next(iter(functions.values()))
    return "" if activation_name(act) else f"uses {type(act).__name__}; known are {KNOWN}"
