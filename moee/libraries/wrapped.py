"""Modules as Python hands them over: compiled ones are unwrapped, and what cannot be copied is refused."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from moee.errors import UserError

log = logging.getLogger("moee")


def plain(module: Any, title: str) -> Any:
    """A module as it can be copied and worked on: without `torch.compile` around it. Anything but a module as it is.

    Raises `UserError` for a module whose weights are not there as plain tensors: TorchScript, the device meta, quantised ones,
    and weights that are computed anew at each run, as pruning leaves them.
    """
    while isinstance(getattr(module, "_orig_mod", None), nn.Module):
        _say_compiled(title)
        module = module._orig_mod
    if not isinstance(module, nn.Module):
        return module
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise UserError(f"{title} is TorchScript, whose layers cannot be cut; give the torch.nn.Module that it was made from")
    state = module.state_dict()
    odd = next((name for name, t in state.items() if not isinstance(t, Tensor) or t.is_quantized), None)
    if odd is not None:
        raise UserError(f"{title} is quantised ({odd}); give the model of before, and choose int8 at the export")
    if any(tensor.is_meta for tensor in state.values()):
        raise UserError(f"{title} is on the device meta, which has no weights; give it with them")
    for name, part in module.named_modules():
        made = next((key for key, value in vars(part).items() if isinstance(value, Tensor) and not value.is_leaf), None)
        if made is not None:
            raise UserError(
                f"{title} computes {f'{name}.' if name else ''}{made} anew at each run, as pruned layers do; make it a plain "
                "weight first (torch.nn.utils.prune.remove, remove_weight_norm)"
            )
    return module


@functools.cache
def _say_compiled(title: str) -> None:
    """Once for each model: it is loaded many times."""
    log.info("%s was compiled (torch.compile); the module that was compiled is taken", title)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module with `torch.compile` taken from its submodules, in place."""
    for part in list(module.modules()):
        for name, inner in list(part.named_children()):
            if isinstance(getattr(inner, "_orig_mod", None), nn.Module):
                _say_compiled(type(module).__name__)
                setattr(part, name, inner._orig_mod)
    return module
