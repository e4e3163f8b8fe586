"""Weights that a module computes anew at each run: by a parametrisation of torch, or by the hooks of its older functions."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

PARTS = "parametrizations"  # where torch keeps a module's parametrisations
NAMES = {"_WeightNorm": "weight norm", "_SpectralNorm": "spectral norm", "_Orthogonal": "orthogonal"}
HOOKS: tuple[tuple[type, str, str], ...] = (
    (WeightNorm, "weight norm", "torch.nn.utils.remove_weight_norm"),
    (SpectralNorm, "spectral norm", "torch.nn.utils.remove_spectral_norm"),
    (BasePruningMethod, "pruning", "torch.nn.utils.prune.remove"),
)


def computed(module: nn.Module) -> str:
    """What computes weights of this module, without its parts, and what makes them plain; empty if nothing does."""
    if is_parametrized(module):
        parts: Any = module.parametrizations
        kinds = [type(step).__name__ for steps in parts.values() for step in steps]
        names = ", ".join(dict.fromkeys(NAMES.get(kind, kind) for kind in kinds))
        return f"has a parametrisation ({names}): remove it with torch.nn.utils.parametrize.remove_parametrizations"
    for hook in module._forward_pre_hooks.values():
        for kind, name, cure in HOOKS:
            if isinstance(hook, kind):
                return f"has weights that a hook computes ({name}): remove it with {cure}"
    return ""


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no parts, but for parametrisations of its own weights."""
    return all(name == PARTS for name, _ in module.named_children())


def is_parametrisation(path: str) -> bool:
    """Whether the module at a path is one that computes another's weights."""
    return PARTS in path.split(".")
