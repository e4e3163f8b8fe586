"""Load a model by name, with its weights; what an MLP of one is."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from moee.cures import cures
from moee.errors import MissingDependency, UserError
from moee.interface.spec import ModelSpec
from moee.libraries.from_module import MODULE
from moee.libraries.from_python import PYTHON
from moee.libraries.from_torchvision import TORCHVISION
from moee.libraries.from_transformers import HF
from moee.libraries.library import Library
from moee.schema import reason_of, shown
from moee.store.cache import tensor_hash
from moee.weights.hub import pretrained_model
from moee.weights.loading import load_weights
from moee.weights.weights_file import checkpoint_sha256

MAX_ARGUMENT = 1 << 14  # of a model: pixels, widths and depths are below it
MAX_OUTPUTS = 1 << 20  # classes; ImageNet-21k has 21,843
MAX_DEPTH = 1024  # blocks; a model's construction takes time for each
Shape = tuple[int, int, int]  # of one image: channels, height, width in pixels
WEIGHTS = ("give --pretrained", "a file with --checkpoint", "a seed with --random-weights to draw them")
RESIZES = {"img_size", "patch_size", "in_chans"}  # arguments to which timm fits pretrained weights
# Arguments of timm.create_model that name files or hubs. A manifest is not trusted, and timm would unpickle a .pth file.
FILE_ARGUMENTS = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained"}


def build_model(spec: ModelSpec) -> nn.Module:
    """The model of `spec` in eval mode, float32, with weights of no meaning: for its shapes, or to be filled.

    Raises `UserError` for an unknown name, arguments that the model refuses, and a function that only a file names.
    """
    check_arguments(spec)
    try:
        return LIBRARIES[spec.library].create(spec)
    except (MissingDependency, UserError):
        raise
    except Exception as error:  # models refuse arguments in many ways
        reason = reason_of(error)
        raise UserError(f"{spec.called} refused the arguments {shown(spec.kwargs)}: {reason}") from error


def check_arguments(spec: ModelSpec) -> None:
    """Raises `UserError` for a name that its library does not know, and for arguments that would open files or are beyond any
    model."""
    LIBRARIES[spec.library].check(spec)
    if spec.library != "python":  # whose arguments mean what the user's own code makes of them
        check_numbers({**(spec.config or {}), **spec.kwargs}, spec.called)


def _check_timm(spec: ModelSpec) -> None:
    if not timm.is_model(spec.timm_name):
        close = difflib.get_close_matches(spec.timm_name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; `timm.list_models()` lists the names"
        name = shown(spec.name)
        raise UserError(
            f"unknown model {name}: expected a timm name or one of the aliases dinov2-s, vit-scratch, swin-scratch, "
            f"convnext-scratch{hint}"
        )
    forbidden = sorted(spec.kwargs.keys() & FILE_ARGUMENTS)
    if forbidden:
        raise UserError(f"{spec.timm_name} with the argument {forbidden[0]}: it would open files; give weights with --checkpoint")


def check_numbers(arguments: Mapping[str, Any], who: Path | str, most_blocks: int = MAX_DEPTH) -> None:
    """Raises `UserError`, which says `who` asks, for arguments of a model that no model has: it would be built for hours."""
    for key, value in arguments.items():
        depth = re.search("depth|layers|blocks", key) is not None
        most = most_blocks if depth else MAX_OUTPUTS if key == "num_classes" else MAX_ARGUMENT
        numbers = list(_numbers(value))
        for number in [*numbers, sum(map(abs, numbers))] if depth else numbers:  # stages are built one after another
            if not abs(number) <= most:  # NaN as well
                raise UserError(f"{who} asks for {shown(key)} {shown(number)}; expected at most {most}")


def _numbers(value: Any) -> Iterator[float]:
    """Every number in a model's argument."""
    if isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield value


def load_model(spec: ModelSpec) -> nn.Module:
    """The model of `spec` with its weights, in eval mode, float32. The same spec gives the same weights, bit by bit; the
    caller's random state is left as it was.

    Raises `UserError` for an unknown name, arguments that the model refuses, weights that do not fit, and a spec that does not
    say where its weights come from.
    """
    if not spec.has_weights:
        raise UserError(
            f"{shown(spec.name, quoted=False)} has no weights: "
            + cures(*WEIGHTS, elsewhere="extract again")
        )
    if sum((spec.pretrained, spec.weights is not None, spec.random_seed is not None)) > 1:
        raise UserError(f"{shown(spec.name, quoted=False)} names two sources of weights; expected pretrained, a file or a seed")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(spec.random_seed or 0)  # torch.manual_seed would seed the GPUs as well
        model = _pretrained(spec) if spec.pretrained else build_model(spec)
    if spec.weights is not None:
        _check_hash(Path(spec.weights), spec.weights_sha256)
        load_weights(model, Path(spec.weights), spec.part)
    elif spec.weights_sha256 is not None and not any(p.is_meta for p in model.parameters()):
        if state_sha256(model, spec) != spec.weights_sha256:
            raise UserError(_drifted(spec))
    return model


def _drifted(spec: ModelSpec) -> str:
    if spec.pretrained:
        return LIBRARIES[spec.library].drifted(spec)
    return (
        f"the weights of {spec.called} that --random-weights {spec.random_seed} draws here are not those that the artifact "
        "was made from: another version of PyTorch or another processor draws others; extract again"
    )


def _pretrained(spec: ModelSpec) -> nn.Module:
    """The model with its library's weights. Raises `MissingDependency` if they cannot be had."""
    check_arguments(spec)
    try:
        model = LIBRARIES[spec.library].pretrained(spec)
    except (TypeError, AssertionError, ValueError):
        build_model(spec)  # refuses the arguments, if it was they
        raise
    return model


def state_sha256(model: nn.Module, spec: ModelSpec) -> str:
    """SHA-256 over names, types, shapes and bytes of the state of `spec`'s model, but for tensors that timm resizes when it loads
    pretrained weights: the last bit of an interpolation is the machine's."""
    state = model.state_dict()
    if spec.library == "timm" and spec.pretrained and not RESIZES.isdisjoint(spec.kwargs):
        own = {name: value for name, value in spec.kwargs.items() if name not in RESIZES}
        with torch.device("meta"):
            usual = build_model(spec.model_copy(update={"kwargs": own})).state_dict()
        state = {name: t for name, t in state.items() if name in usual and usual[name].shape == t.shape}
    return tensor_hash(*state.values(), extra=" ".join(state))


def _created(spec: ModelSpec, create: Callable[..., nn.Module] | None = None) -> nn.Module:
    """timm's model in eval mode; its own description says which images it takes, and not those of timm's weights."""
    kwargs = dict(spec.kwargs)
    if isinstance(kwargs.get("img_size"), list):  # as JSON has it
        kwargs["img_size"] = tuple(kwargs["img_size"])
    if spec.input is not None:
        kwargs["pretrained_cfg_overlay"] = spec.input.model_dump(exclude_none=True)
    model = (create or timm.create_model)(spec.timm_name, **kwargs).eval()
    described: dict[str, Any] = dict(getattr(model, "pretrained_cfg", {}))
    channels, *sides = described.get("input_size") or (3, 224, 224)
    size, count = spec.input_size or spec.kwargs.get("img_size"), spec.kwargs.get("in_chans")
    if isinstance(size, int):
        sides = [size, size]
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        sides = list(size)
    described["input_size"] = (count if isinstance(count, int) else channels, *sides)
    model.pretrained_cfg = model.default_cfg = described  # type: ignore[assignment]
    return model


def _drifted_timm(spec: ModelSpec) -> str:
    return (
        f"timm's pretrained weights of {spec.timm_name} are not those that the artifact was made from; install the timm "
        "version of then, or extract again"
    )


def _timm_classes(spec: ModelSpec) -> int | None:
    config = timm.get_pretrained_cfg(spec.timm_name)
    return None if config is None else config.num_classes


TIMM = Library(
    _check_timm, _created, lambda spec: _created(spec, pretrained_model), lambda spec: "img_size", lambda spec: True,
    _timm_classes, _drifted_timm,
)  # fmt: skip
LIBRARIES: Mapping[str, Library] = {"timm": TIMM, "torchvision": TORCHVISION, "hf": HF, "python": PYTHON, "module": MODULE}


def _check_hash(path: Path, expected: str | None) -> None:
    """Raises `UserError` if the weights of an artifact's dense model are not there, or not those that it was made from."""
    if expected is None:
        return
    if not path.is_file():
        raise UserError(f"weights {path} not found: {cures('put the file back', 'give its new place with --checkpoint')}")
    if checkpoint_sha256(path) != expected:
        raise UserError(
            f"weights {path} have changed since the artifact was made; "
            + cures("put the old file back", "give it with --checkpoint", "extract again")
        )


def names_of(model: nn.Module, module: nn.Module) -> list[str]:
    """Every name under which `module` is part of the model: shared modules have several."""
    return [name for name, part in model.named_modules(remove_duplicate=False) if part is module]


def sharing(model: nn.Module, dense: nn.Module) -> nn.Module:
    """A copy of `model` whose layers can be replaced; the weights that it has of the `dense` model stay the same tensors. They
    are not to be changed in place: where the copy is kept, make it whole with `copy.deepcopy`."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in dense.parameters()})


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `name` is, and wherever else the model holds the same module."""
    for each in names_of(model, model.get_submodule(name)):
        parent, _, leaf = each.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
