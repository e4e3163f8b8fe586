"""From any `nn.Module` to a model that the project can work with: what it gives, where its features are, which images it takes.

Nothing about a model is taken from its name where running it can tell: it is run once on two blank images, without memory where
it can be, and what its submodules gave is looked at. What only a guess can tell is noted, for the user to read.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moee.config import MAX_SIDE
from moee.cures import cures
from moee.errors import UserError
from moee.interface.adapted import AdaptedModel, Description, on_meta, output_of, tensor_in
from moee.interface.spec import InputConfig, LibraryName
from moee.libraries.feature_map import Shape, last_map, prefix_comes_first, prefix_tokens
from moee.libraries.preparation import channels_of, described_input
from moee.schema import reason_of

log = logging.getLogger("moee")


@dataclass(frozen=True)
class _Observed:
    """One run on two blank images: the output [2, C], and what each submodule gave, in the order in which they ended."""

    output: Tensor
    given: list[tuple[str, Tensor]]
    is_logits: bool  # transformers says so


def library_of(module: nn.Module) -> LibraryName:
    """The library that a model comes from; one that speaks as timm's do counts as timm's."""
    if all(hasattr(module, name) for name in ("forward_features", "forward_head", "num_features", "num_classes")) and (
        hasattr(module, "pretrained_cfg") or hasattr(module, "default_cfg")
    ):
        return "timm"
    roots = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    if "transformers" in roots:
        return "hf"
    return "torchvision" if type(module).__module__.startswith("torchvision.") else "python"


def adapt(
    module: nn.Module, given: InputConfig | None = None, num_classes: int | None = None, title: str | None = None,
    head: Sequence[str] = (),
) -> nn.Module:  # fmt: skip
    """`module` in eval mode, as it is if it speaks as timm's models do, else as an `AdaptedModel`, whose `description.notes` say
    what was guessed.

    `given`: what is known of its input; the rest is looked for on the module. `num_classes`: what its outputs are, 0 for
    features; looked for as well. `title`: its name in sentences. `head`: the submodules that are its classifier, where known.
    Raises `UserError` for an object that is no module, a model whose input nobody tells, that does not run on it, or that gives
    anything but one vector an image.
    """
    if not isinstance(module, nn.Module):
        raise UserError(f"{title or 'the model'} is a {type(module).__name__}; expected a torch.nn.Module")
    library, own = library_of(module), getattr(module, "num_classes", None)
    if isinstance(module, AdaptedModel):
        if given is None and num_classes in (None, own):
            return module
        return _adapted_again(module, given, num_classes)
    if library == "timm":
        own = _told_by_head(module, given, own)
        if num_classes in (None, own):
            return _with_input(module, given).eval()
        given = _sized_as_built(module, given or InputConfig())
    title = title or type(module).__name__
    config, notes, unsaid = described_input(module, given or InputConfig(), title)
    module.eval()
    observed = _observe(module, config["input_size"], title)
    named = tuple(head)
    head = named or _heads(module, observed)
    classes, guessed = _classes(module, observed, num_classes, library, head, title)
    inputs = _input_width(module, head)
    features, width, channels_last = last_map(observed.given, inputs)
    notes += guessed
    if features is None:
        notes.append(f"no submodule of {title} gives a last feature map: single tokens are not compared")
    prefix = prefix_tokens(module, config["input_size"], features, channels_last)
    if prefix and features is not None and not prefix_comes_first(module, config["input_size"], features[1].shape[1], prefix):
        notes.append(f"{prefix} tokens of {title} are no patches and do not come before them: every token counts alike")
        prefix = 0
    output_width = observed.output.shape[1]
    return AdaptedModel(module, Description(
        title=title, features=features[0] if features else None, num_classes=classes,
        num_features=width or inputs or output_width, output_width=output_width, num_prefix_tokens=prefix,
        classifier=head if classes else named,
        config={**config, "architecture": title}, notes=tuple(notes), guessed=unsaid,
    )).eval()  # fmt: skip


def _adapted_again(model: AdaptedModel, given: InputConfig | None, num_classes: int | None) -> nn.Module:
    """The model inside, adapted with what is told anew."""
    was = model.description
    known = {name: was.config[name] for name in InputConfig.model_fields if name in was.config and name not in was.guessed}
    known |= given.model_dump(exclude_none=True) if given is not None else {}
    told = was.num_classes if num_classes is None else num_classes
    return adapt(model.net, InputConfig(**known), told, was.title, was.classifier if told else ())


def _sized_as_built(module: nn.Module, given: InputConfig) -> InputConfig:
    """`given` with the size that timm built the module for, which may be another than its description's."""
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if size is None or given.input_size is not None:
        return given
    return given.model_copy(update={"input_size": (channels_of(module), *size)})


def _told_by_head(module: Any, given: InputConfig | None, told: Any) -> Any:
    """How many classes a model that speaks as timm's do tells apart; where someone has put another classifier into it, as many as
    it gives, which it says from now on."""
    heads = module.get_classifier() if hasattr(module, "get_classifier") else None
    if (isinstance(heads, nn.Linear) and heads.out_features == told) or (isinstance(heads, nn.Identity) and told == 0):
        return told
    title = type(module).__name__
    try:
        shape = described_input(module, _sized_as_built(module, given or InputConfig()), title)[0]["input_size"]
        width = _observe(module.eval(), shape, title).output.shape[1]
    except UserError:  # which is said where it runs
        return told
    if width != (told or getattr(module, "num_features", width)):
        _say_classes(title, told, width)
        module.num_classes = told = width
    return told


@functools.cache
def _say_classes(title: str, told: Any, width: int) -> None:
    """Once for each model: it is loaded many times."""
    log.warning("%s says that it has %s classes and gives %d outputs, which are taken for classes", title, told, width)


def _with_input(module: Any, given: InputConfig | None) -> nn.Module:
    """A model that speaks as timm's do, with what is known of its input beside what it says itself."""
    if given is not None and (told := given.model_dump(exclude_none=True)):
        own = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
        module.pretrained_cfg = module.default_cfg = {**own, **told}
    return module


def _observe(module: nn.Module, shape: Shape, title: str) -> _Observed:
    """Run the module on two blank images, without memory; for real where that fails and there are weights."""
    if not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in shape):
        raise UserError(f"{title} says that it takes images of {list(shape)}; expected channels, height and width")
    real = not any(p.is_meta for p in module.parameters())
    try:
        return _run(on_meta(module), shape, "meta", title)
    except UserError:
        raise
    except Exception as error:
        if not real:
            raise _refused(title, shape, error) from error
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    try:
        return _run(module, shape, device, title)
    except UserError:
        raise
    except Exception as error:
        raise _refused(title, shape, error) from error


def _refused(title: str, shape: Shape, error: Exception) -> UserError:
    channels, height, width = shape
    what = f"{height} x {width} pixels and {channels} channels"
    size = cures("; give their size with --img-size")
    return UserError(f"{title} does not run on images of {what} ({reason_of(error)}){size}")


def _run(module: nn.Module, shape: Shape, device: torch.device | str, title: str) -> _Observed:
    given: list[tuple[str, Tensor]] = []

    def watch(name: str):
        def hook(part: nn.Module, args: Any, output: Any) -> None:
            tensor = tensor_in(output)
            if tensor is not None:
                given.append((name, tensor))

        return hook

    handles = [part.register_forward_hook(watch(name)) for name, part in module.named_modules() if name]
    try:
        # What a model makes on the way, it makes on the CPU, as when it runs: transformers' BEiT keeps its relative positions
        # in a cache, and those made without memory would be used in every later run.
        with torch.no_grad(), torch.device("cpu"):
            result: Any = module(torch.zeros(2, *shape, device=device))
    finally:
        for handle in handles:
            handle.remove()
    output = output_of(result, title)
    if output.shape[0] != 2:
        raise UserError(f"{title} gives {output.shape[0]} outputs for 2 images; expected one vector an image")
    return _Observed(output, given, output is getattr(result, "logits", None))


def _heads(module: nn.Module, observed: _Observed) -> tuple[str, ...]:
    """The linear map whose output is the model's; where several are averaged, as in a distilled DeiT, all near the top."""
    linear = {name for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    last = [name for name, given in observed.given if name in linear and given is observed.output]
    if last:
        return (last[-1],)
    if not observed.is_logits:
        return ()
    width = observed.output.shape[1]
    return tuple(n for n, given in observed.given if n in linear and "." not in n and given.shape[1:] == (width,))


def _classes(
    module: nn.Module, observed: _Observed, told: int | None, library: LibraryName, head: tuple[str, ...], title: str
) -> tuple[int, list[str]]:  # fmt: skip
    """How many classes the outputs are of, 0 for features; and what was guessed."""
    width = observed.output.shape[1]
    if told is not None:
        if told not in (0, width):
            raise UserError(f"{title} gives {width} outputs, --num-classes says {told}: leave it out, or give {width} or 0")
        return told, []
    own = getattr(module, "num_classes", None)
    if isinstance(own, int) and own in (0, width):
        return own, []
    if library == "torchvision":
        return width if head else 0, []
    if library == "hf":
        return width if observed.is_logits and head else 0, []
    if head and not re.search("proj|emb", head[-1].rpartition(".")[2]):
        note = f"the {width} outputs of {title} are taken for classes, since `{head[-1]}` is its last layer"
        return width, [f"{note}; --num-classes 0 says that they are features"]
    return 0, [f"the {width} outputs of {title} are taken for features; --num-classes {width} says that they are classes"]


def _input_width(module: nn.Module, head: tuple[str, ...]) -> int:
    """Width of the features that the classifier reads; 0 without one."""
    parts: dict[str, Any] = dict(module.named_modules())
    return next((parts[name].in_features for name in head if isinstance(parts.get(name), nn.Linear)), 0)


def without_head(module: nn.Module, head: Sequence[str]) -> None:
    """Put nothing in the place of a classifier, so that the model gives what it read."""
    for name in head:
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Identity())


def takes(function: Any, argument: str) -> bool:
    """Whether a function can be called with an argument of that name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
