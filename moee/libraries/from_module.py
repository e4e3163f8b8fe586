"""Models that Python holds already: a `torch.nn.Module` of the user's, trained, which nothing but the user can make again.

An artifact of one records its name and the hash of its weights. Whoever opens it hands the module over (`moee.load`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from moee.errors import UserError
from moee.interface.adapted import on_meta
from moee.interface.spec import InputConfig, ModelSpec
from moee.libraries.adapt import adapt
from moee.libraries.library import Library
from moee.libraries.wrapped import copied, plain, unwrapped
from moee.schema import shown


def module_spec(module: nn.Module, num_classes: int | None = None, given: InputConfig | None = None) -> ModelSpec:
    """The spec of a module, without the hash of its weights. `num_classes`: what its outputs are, 0 for features; `given`: how
    its images are prepared; both are looked for on the module. Raises `UserError` for an object that is no module."""
    if not isinstance(module, nn.Module):
        raise UserError(f"the model is a {type(module).__name__}; expected a torch.nn.Module or a name")
    module = plain(module, type(getattr(module, "_orig_mod", module)).__name__)
    title = f"{type(module).__module__}.{type(module).__qualname__}".removeprefix("__main__.")
    spec = ModelSpec(name=title, timm_name=title, library="module", outputs=num_classes, input=given)
    return spec.with_module(module)


def _check(spec: ModelSpec) -> None:
    if spec.module is None:
        name = shown(spec.name, quoted=False)
        raise UserError(
            f"the artifact was made from a module in Python ({name}), which only Python can give: open it there with "
            "moee.load(PATH, model=MODULE)"
        )


def _create(spec: ModelSpec) -> nn.Module:
    """A copy of the module, float32, on the CPU; its shapes alone where the default device is meta."""
    assert spec.module is not None, "_check saw it"
    if torch.empty(0).device.type == "meta":
        try:
            return on_meta(_adapted(_copied(spec, on_meta), spec))
        except UserError:  # it may run with its weights alone
            with torch.device("cpu"):
                return on_meta(_adapted(_copied(spec), spec))
    with torch.device("cpu"):
        return _adapted(_copied(spec).cpu().float(), spec)


def _adapted(own: nn.Module, spec: ModelSpec) -> nn.Module:
    return adapt(unwrapped(own, spec.name), spec.input, spec.outputs, spec.name)


def _copied(spec: ModelSpec, by: Callable[[nn.Module], nn.Module] = copy.deepcopy) -> nn.Module:
    return copied(plain(spec.module, spec.name), spec.name, by)


def _drifted(spec: ModelSpec) -> str:
    return f"the weights of the given {spec.name} are not those that the artifact was made from; give the model of then"


MODULE = Library(_check, _create, _create, lambda spec: None, lambda spec: False, lambda spec: None, _drifted)
