"""Models of the user's own: `package.module:function`, a function or class that returns a `torch.nn.Module`.

Importing a module runs it. So a function is imported only where a person names it on the command line or in Python; one that
only a manifest names is never imported (`ModelSpec.named_by_user`).
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from moee.cures import cures
from moee.errors import UserError
from moee.interface.adapted import on_meta
from moee.interface.spec import InputConfig, ModelSpec
from moee.libraries.adapt import adapt, takes
from moee.libraries.library import Library, Named
from moee.libraries.preparation import channels_of
from moee.libraries.wrapped import copied, plain, unwrapped
from moee.schema import reason_of, shown

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
HUBS = ("hf_hub", "local_dir")  # how timm also spells its prefixes
OUTPUTS = "num_classes"


def is_function_name(name: str) -> bool:
    """Whether a model's name is `package.module:function`."""
    return NAME.fullmatch(name) is not None and name.partition(":")[0] not in (*HUBS, "torchvision", "hf")


def named(name: str, arguments: dict[str, Any]) -> Named:
    """The model of a function that the user names. Raises `UserError` for one that cannot be imported or called.

    A number of classes is passed on to a function that takes it; else it says what the model's outputs are.
    """
    told = arguments.get(OUTPUTS)
    spec = ModelSpec(name=name, timm_name=name, library="python", kwargs=arguments).with_word(name)
    if told is not None and not takes(_function(name), OUTPUTS):
        rest = {key: value for key, value in arguments.items() if key != OUTPUTS}
        spec = spec.model_copy(update={"kwargs": rest, "outputs": told})
    _check(spec)
    return Named(spec)


def _check(spec: ModelSpec) -> None:
    """Raise `UserError` for a function that only a file names, and for one that cannot be had or called."""
    if not is_function_name(spec.timm_name):
        raise UserError(f"{shown(spec.timm_name)} is no function; expected package.module:function")
    if not spec.named_by_user:
        name = shown(spec.timm_name, quoted=False)
        raise UserError(
            f"the artifact was made from the function {name}, and what a file names is never imported"
            + cures(f": say with --model {name} that it is yours", elsewhere="; a command with --model takes it")
        )
    function = _function(spec.timm_name)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a callable written in C
        return
    try:
        signature.bind(**spec.kwargs)
    except TypeError as error:
        wanted = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD,
                  p.VAR_POSITIONAL) and p.name not in spec.kwargs]  # fmt: skip
        cure = f"give --model-kwargs {' '.join(f'{name}=VALUE' for name in wanted)}" if wanted else "see --model-kwargs"
        raise UserError(f"{spec.timm_name} cannot be called with {shown(spec.kwargs)}: {reason_of(error)}; {cure}") from error


def _function(name: str) -> Callable[..., Any]:
    """What stands under `package.module:function`. Raises `UserError` that says which part was not found, or failed."""
    where, _, path = name.partition(":")
    with torch.device("cpu"), _current_folder():  # what the module makes when it is imported lasts
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is not None and (where == error.name or where.startswith(f"{error.name}.")):
                raise UserError(
                    f"{name}: there is no module {error.name} in Python's path or in the current folder {os.getcwd()}; expected "
                    "package.module:function, torchvision:NAME, hf:FOLDER, hf-hub:ID, local-dir:FOLDER or a timm name"
                ) from error
            raise UserError(f"{name}: importing {where} failed ({reason_of(error)})") from error
        except (Exception, SystemExit) as error:  # it is someone's own code
            raise UserError(f"{name}: importing {where} failed ({type(error).__name__}: {reason_of(error)})") from error
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise UserError(f"{name}: {where} has no {part}{hint}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        raise UserError(f"{name} is a {type(found).__name__}; expected a function or class that returns a torch.nn.Module")
    return found


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """A block in which modules are looked for in the current folder too, after all others, as `python -m` finds them there."""
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
        importlib.invalidate_caches()
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


def _create(spec: ModelSpec) -> nn.Module:
    """What the function returns, float32, on the CPU; its shapes alone where the default device is meta."""
    with_memory = torch.empty(0).device.type != "meta"
    function = _function(spec.timm_name)
    try:
        with torch.device("cpu"), _current_folder():
            module = function(**spec.kwargs)
    except (Exception, SystemExit) as error:  # it is someone's own code
        raise UserError(f"{spec.timm_name} raised {type(error).__name__}: {reason_of(error)}") from error
    if not isinstance(module, nn.Module):
        raise UserError(f"{spec.timm_name} returned a {type(module).__name__}; expected a torch.nn.Module")
    title = f"the model that {spec.timm_name} returned"
    module = unwrapped(copied(plain(module, title), title), title).cpu().float()  # a copy: it may be given again
    given = spec.input or InputConfig()
    model = adapt(module, _sized(given, spec, module), spec.outputs, spec.timm_name)
    return model if with_memory else on_meta(model)


def _sized(given: InputConfig, spec: ModelSpec, module: nn.Module) -> InputConfig:
    """`given` for images of the size that is asked for."""
    if spec.input_size is None:
        return given
    return given.model_copy(update={"input_size": (channels_of(module), *spec.input_size)})


def _size_argument(spec: ModelSpec) -> str | None:
    function = _function(spec.timm_name)
    parameters = inspect.signature(function).parameters
    return next((name for name in ("img_size", "image_size") if name in parameters), None)


def _drifted(spec: ModelSpec) -> str:
    return (
        f"the weights that {spec.timm_name} returns are not those that the artifact was made from, or other ones at every call; "
        "give the function of then, or extract again"
    )


def _takes_classes(spec: ModelSpec) -> bool:
    return takes(_function(spec.timm_name), OUTPUTS)


PYTHON = Library(_check, _create, _create, _size_argument, _takes_classes, lambda spec: None, _drifted)
