"""Modules as Python hands them over: what was wrapped around them is taken off, and what cannot be copied is refused."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from moee.errors import UserError
from moee.interface.computed import computed
from moee.schema import reason_of

log = logging.getLogger("moee")
INSIDE = {  # where wrappers that compute the same keep the module, and what was done to it
    "_orig_mod": "compiled (torch.compile)",
    "_checkpoint_wrapped_module": "wrapped to be checkpointed (checkpoint_wrapper)",  # its state leaves this name out
}


def plain(module: Any, title: str) -> Any:
    """A module as it can be copied and worked on: without wrappers around it. Anything but a module as it is.

    Raises `UserError` for a module whose weights are not there as plain tensors: TorchScript, the device meta, quantised ones,
    and weights that are computed anew at each run, as pruning leaves them.
    """
    while (inner := _inside(module, title)) is not None:
        module = inner
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
        if not is_parametrized(part) and (by := computed(part)):
            raise UserError(f"`{name or type(part).__name__}` of {title} {by} first")
        made = next((key for key, value in vars(part).items() if isinstance(value, Tensor) and not value.is_leaf), None)
        if made is not None:
            raise UserError(
                f"{title} computes {f'{name}.' if name else ''}{made} anew at each run; make it a plain weight "
                "first"
            )
    return module


def copied(module: nn.Module, title: str, by: Callable[[nn.Module], nn.Module] = copy.deepcopy) -> nn.Module:
    """A copy of someone's module, which stays as it is: layers are cut in the copy, and whoever has the module may give it, or
    parts of it, again. Raises `UserError` for one that cannot be copied."""
    try:
        return by(module)
    except Exception as error:  # it is someone's own code
        raise UserError(f"{title} cannot be copied ({reason_of(error)}); give a module that can be") from error


def unwrapped(module: nn.Module, title: str) -> nn.Module:
    """The module with wrappers taken from its submodules, and torch's encoder layers run part by part, in place. Raises
    `UserError` for one whose state has other names than its modules: what was saved could not be read again."""
    for part in list(module.modules()):
        for name, child in list(part.named_children()):
            while (inner := _inside(child, title)) is not None:
                setattr(part, name, inner)
                child = inner
        if isinstance(part, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            _run_by_parts(part)
    state = module.state_dict()
    lost = next((name for name in _names(module) if name not in state), None)
    if lost is not None:
        raise UserError(
            f"{title} saves its weights under other names than its modules have ({lost}), as wrappers do; give the module inside"
        )
    return module


def _run_by_parts(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
    """A layer of torch whose activation is a module, and which does without the kernel that in eval mode reads the weights past
    their modules: what takes the place of a part would not be run."""
    for function, module in ((nn.functional.relu, nn.ReLU), (nn.functional.gelu, nn.GELU)):
        if layer.activation is function:
            layer.activation = module()
    if isinstance(layer, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0


def _names(module: nn.Module) -> Iterator[str]:
    """Names that the parameters and the saved buffers of a module have by their places."""
    for path, part in module.named_modules(remove_duplicate=False):
        kept = (name for name, buffer in part._buffers.items() if buffer is not None)
        for name in (
            *(name for name, parameter in part._parameters.items() if parameter is not None),
            *(name for name in kept if name not in part._non_persistent_buffers_set),
        ):
            yield f"{path}.{name}" if path else name


def _inside(module: Any, title: str) -> nn.Module | None:
    """The module that a wrapper holds, which is said; None where it is none."""
    for name, what in INSIDE.items():
        inner = getattr(module, name, None)
        if isinstance(module, nn.Module) and isinstance(inner, nn.Module):
            _say_wrapped(title, what)
            return inner
    return None


@functools.cache
def _say_wrapped(title: str, what: str) -> None:
    """Once for each model: it is loaded many times."""
    log.info("%s was %s; the module inside is taken", title, what)
