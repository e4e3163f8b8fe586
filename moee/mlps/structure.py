"""What a module's parts say about whether it is an MLP, down(act(up(x))), without running it.

A candidate is the innermost module that holds two linear maps (or 1x1 convolutions) and something without parameters that could
be their activation, whatever these are called. Where the three lie among other parts or in several modules, only running the
model shows which belong together: `moee.mlps.flow` finds them, `read_split` reads them. `moee.mlps.find` proves by running them
what this file takes for MLPs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm.layers import DropPath
from torch import nn

from moee.errors import UserError
from moee.interface.adapted import title_of_model
from moee.interface.computed import computed, is_leaf, is_parametrisation
from moee.layers.activations import KNOWN, activation_name
from moee.mlps.gated_structure import gated_width, read_gated
from moee.models.ffn import FFN
from moee.schema import shown

INERT = (nn.Identity, DropPath, nn.modules.dropout._DropoutNd)  # pass their input on in eval mode

SHARED = "shares weights with another module"
HOOKED = "has a forward hook, which would no longer run"


def runs_several_times(count: int) -> str:
    """What is said of an MLP that one forward pass runs several times: what takes its place would see the tokens of all runs."""
    return f"runs {count} times in one forward pass, on other tokens each time; only what runs once is cut"


@dataclass(frozen=True)
class Dense:
    """A candidate that stays dense: why, and the width of its hidden layer."""

    reason: str
    hidden: int


def read_mlp(model: nn.Module, name: str, bypassed: Sequence[str] = ()) -> FFN:
    """The module `name` as an MLP, by structure alone, or a split one, whose activation and down map are `bypassed`. Raises
    `UserError` with the reason if it is none."""
    try:
        parts = [model.get_submodule(path) for path in (name, *bypassed)]
    except AttributeError:
        missing = next(path for path in (name, *bypassed) if path not in dict(model.named_modules(remove_duplicate=False)))
        raise UserError(f"{title_of_model(model)} has no module {shown(missing)}") from None
    found = read_split((name, *bypassed), *parts) if bypassed else read_module(name, parts[0])
    if isinstance(found, FFN):
        return found
    reason = found.reason if found else "it does not hold two linear maps and an activation"
    raise UserError(f"`{name}` is no plain MLP: {reason}")


def candidates(model: nn.Module) -> dict[str, FFN | Dense]:
    """Every innermost module that holds two linear maps and an activation, as an MLP or with what speaks against it. A list or a
    dictionary of modules is none: it is never called, and its parts are looked for as they run."""
    found: dict[str, FFN | Dense] = {}
    shared = shared_parameters(model)
    for name, module in model.named_modules():
        if not name or type(module).forward is nn.Module.forward or not (read := read_module(name, module)):
            continue
        if isinstance(read, FFN) and any(id(p) in shared for p in module.parameters()):
            read = Dense(SHARED, read.hidden)
        found[name] = read
    return found


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that more than one module holds."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {key for key, count in owners.items() if count > 1}


def hooked(module: nn.Module, inside: bool = True) -> bool:
    """Whether someone's hook sees what goes into a module or comes out of it, or, `inside`, of a part of it. What takes its place
    has no such hook, and what the hook keeps for another part of the model would be of an earlier run."""
    parts = module.modules() if inside else (module,)
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def is_map(module: nn.Module) -> bool:
    """Whether a module is a linear map or a 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        return set(module.kernel_size) == {1} and module.groups == 1
    return isinstance(module, nn.Linear)


def _is_function(module: nn.Module) -> bool:
    return not [*module.parameters(), *module.buffers()]


def _is_plain(module: nn.Module) -> bool:
    """Whether a map is computed as torch does; subclasses may standardise or mask their weights first."""
    if isinstance(module, nn.Conv2d) and (set(module.stride) != {1} or module.padding not in ((0, 0), "same", "valid")):
        return False
    return type(module).forward in (nn.Linear.forward, nn.Conv2d.forward) and "forward" not in vars(module)


def read_module(name: str, module: nn.Module) -> FFN | Dense | None:
    """`module` as an MLP, with what speaks against it, or None if it is nothing like one."""
    leaves = {path: part for path, part in module.named_modules() if path and is_leaf(part) and not is_parametrisation(path)}
    maps = {path: part for path, part in leaves.items() if is_map(part)}
    functions = {
        path: part for path, part in leaves.items()
        if path not in maps and not isinstance(part, INERT) and (isinstance(part, nn.PReLU) or _is_function(part))
    }  # fmt: skip
    gated = len(maps) == 3 and sum("." not in path for path in maps) >= 2
    if (len(maps) != 2 and not gated) or _within_one_child(maps):
        return _with_factors(module)
    width = gated_width(maps)
    if width and (as_gated := read_gated(name, module, maps, functions, _unknown(module, maps) or _unplain(maps))):
        return Dense(as_gated, width) if isinstance(as_gated, str) else as_gated
    if not functions:
        return None
    (up_path, up), (down_path, down), *_ = maps.items()
    hidden = int(up.weight.shape[0])
    obstacle = "holds three linear maps" if gated else _obstacle(module, maps, functions)
    if obstacle:
        looks_like_attention = re.search("attn|attention", type(module).__name__, re.IGNORECASE)
        return None if looks_like_attention else Dense(obstacle, hidden)
    return _ffn((name,), up, next(iter(functions.values())), down)


def _with_factors(module: nn.Module) -> Dense | None:
    """What speaks against two maps of an MLP's widths of which one has factors of LoRA beside it, as peft has them."""
    maps: dict[str, Any] = {name: getattr(part, "base_layer", part) for name, part in module.named_children()}
    maps = {name: part for name, part in maps.items() if is_map(part)}
    beside = next((name for name, part in maps.items() if part is not module.get_submodule(name)), None)
    shapes = [tuple(part.weight.shape[:2]) for part in maps.values()]
    if beside is None or len(shapes) != 2 or shapes[0] != shapes[1][::-1] or shapes[0][0] == shapes[0][1]:
        return None
    reason = f"`{beside}` has factors of LoRA beside its weight: merge them first (in peft merge_and_unload())"
    return Dense(reason, max(shapes[0]))


def read_split(paths: Sequence[str], up: Any, act: nn.Module, down: Any) -> FFN | Dense | None:
    """An up map, an activation and a down map that lie apart, at `paths`, as an MLP; otherwise as `read_module`."""
    if not is_map(up) or not is_map(down) or up is down:
        return None
    for path, part in ((paths[0], up), (paths[2], down)):
        if by := computed(part):
            return Dense(f"`{path}` {by}", int(up.weight.shape[0]))
        known = {id(part.weight), id(part.bias)}
        if next(part.children(), None) or any(id(t) not in known for t in (*part.parameters(), *part.buffers())):
            return Dense(f"`{path}` computes its weights from others", int(up.weight.shape[0]))
    if {id(t) for t in up.parameters()} & {id(t) for t in down.parameters()}:
        return Dense("its two maps share weights", int(up.weight.shape[0]))
    reason = _map_obstacle({paths[0]: up, paths[2]: down})
    if not reason and (not _is_function(act) or activation_name(act) is None):
        reason = f"uses {type(act).__name__}; known are {KNOWN}"
    return Dense(reason, int(up.weight.shape[0])) if reason else _ffn(paths, up, act, down)


def _ffn(paths: Sequence[str], up: Any, act: nn.Module, down: Any) -> FFN:
    """The MLP of parts in which nothing speaks against one."""
    w_up, w_down = up.weight.detach().flatten(1), down.weight.detach().flatten(1)
    activation = activation_name(act)
    assert activation is not None, "the caller saw that it is known"
    name, *bypassed = paths
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
        bypassed=tuple(bypassed),
    )


def _within_one_child(maps: dict[str, nn.Module]) -> bool:
    """Whether a part of the module holds all of its maps already."""
    firsts = {path.split(".")[0] for path in maps}
    return len(firsts) == 1


def _unknown(module: nn.Module, maps: dict[str, Any]) -> str:
    """What computes the weights of its maps, or what a module holds beside them, if so."""
    return next((f"`{path}` {by}" for path, part in maps.items() if (by := computed(part))), "") or _foreign(module, maps)


def _foreign(module: nn.Module, maps: dict[str, Any]) -> str:
    """What a module holds beside its maps, if so."""
    inside = {id(t) for part in maps.values() for t in (part.weight, part.bias) if t is not None}
    for path, part in module.named_modules():
        if any(id(t) not in inside for t in (*part._parameters.values(), *part._buffers.values()) if t is not None):
            what = f"`{path}` ({type(part).__name__})" if path else "parameters of its own"
            return f"holds {what} beside its {'two' if len(maps) == 2 else 'three'} linear maps"
    return ""


def _obstacle(module: nn.Module, maps: dict[str, Any], functions: dict[str, nn.Module]) -> str:
    """What keeps a module of two maps from being down(act(up(x))), as far as its parts show it."""
    others = ", ".join(f"`{path}` ({type(part).__name__})" for path, part in functions.items())
    reason = _unknown(module, maps) or _map_obstacle(maps, f"holds {others} beside its two maps" if len(functions) > 1 else "")
    act = next(iter(functions.values()))
    return reason or ("" if activation_name(act) else f"uses {type(act).__name__}; known are {KNOWN}")


def _unplain(maps: dict[str, Any]) -> str:
    """Which of the maps is computed otherwise than torch does, if one is."""
    for path, part in maps.items():
        if not _is_plain(part):
            return f"`{path}` is {type(part).__name__}, no plain linear map"
    return ""


def _map_obstacle(maps: dict[str, Any], others: str = "") -> str:
    """What keeps two maps from being an MLP's. `others` is said, if it is not empty, before their widths are."""
    (up_path, up), (down_path, down) = maps.items()
    if unplain := _unplain(maps):
        return unplain
    if type(up.weight) is not type(down.weight) or up.weight.ndim != down.weight.ndim:
        return "mixes linear maps and convolutions"
    if others:
        return others
    if up.weight.shape[0] != down.weight.shape[1]:
        return f"gated: `{up_path}` gives {up.weight.shape[0]} numbers and `{down_path}` takes {down.weight.shape[1]}"
    if up.weight.shape[1] != down.weight.shape[0]:
        return f"changes the width of its tokens from {up.weight.shape[1]} to {down.weight.shape[0]}"
    return ""
