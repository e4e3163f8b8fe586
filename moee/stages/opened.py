"""A session from what Python has: a module or a name, and images in memory or a source of the command line."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moee.bounds import CLASSES, size, whole
from moee.config import validated
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.given.images import first_shape
from moee.given.preparation import differences, read_preparation, refuse_unfit
from moee.interface.adapted import guesses_of
from moee.interface.spec import InputConfig, ModelSpec
from moee.keywords import spoken
from moee.libraries.from_module import module_spec
from moee.libraries.preparation import UNSAID, described, says_size
from moee.libraries.wrapped import plain
from moee.models.source import ModelOptions, named_model, with_pretrained
from moee.parallel.joining import alone
from moee.progress import Reporter, to_stderr
from moee.schema import shown
from moee.stages.session import Session

log = logging.getLogger("moee")
SOURCE = "_moee_source"  # attribute of a model of `moee.load_model`: its `ModelSpec`, and what it was then
Images = Any  # a DataLoader, a dataset, an iterable of (images, labels), an `ImageSet`, or a source as `--data` takes it


def session_of(
    model: nn.Module | str, data: Images, val: Images = None, *, classes: Sequence[str] = (), num_classes: int | None = None,
    input: InputConfig | Mapping[str, Any] | None = None, device: str = "auto", workers: int = 0,
    report: Reporter | None = None, seed: int = 0, memory: int | str | None = None,
) -> Session:  # fmt: skip
    """A dense model with its images, from what `extract` takes; what was guessed of them is logged."""
    named, bound = class_names(classes), bytes_of(memory)
    group = alone(device)
    source, given = source_of(data, val)
    prepared = None if given is None else read_preparation(data if val is None else val)
    spec = spec_of(model, num_classes, input, None if given is None else Seen(prepared, data))
    session = Session(
        spec, source, seed=seed, report=report or to_stderr(), group=group, workers=workers, classes=named, given=given,
        memory=bound,
    )  # fmt: skip
    session.check_names(named)
    if input is not None and session.spec.input is not None:
        refuse_unfit(session.spec.input, session.transform)
    _say_guesses(session)
    if given is None:
        say_guessed_preparation(session.dense, session.source)
    else:
        _say_preparation(prepared, session)
    return session


@dataclass(frozen=True)
class Seen:
    """Images that Python gave: how their loader prepares them, where it is known, and the training images themselves."""

    prepared: InputConfig | None
    data: Any

    def completed(self, told: InputConfig | None, module: nn.Module) -> InputConfig | None:
        """What a user told of the images, and of the rest what the loader does; the size of the first image, where the module
        does not say its own either."""
        told = told or InputConfig()
        taken = {} if self.prepared is None else self.prepared.model_dump(exclude_none=True)
        if told.input_size is None and not says_size(module) and (shape := first_shape(self.data)) is not None:
            taken["input_size"] = shape
            log.info("the model takes images of %s, as the first that was given", " x ".join(map(str, shape)))
        taken |= told.model_dump(exclude_none=True)
        return InputConfig(**taken) if taken else None


def say_guessed_preparation(model: nn.Module, source: str) -> None:
    """Warn where images of a `source` are prepared in a way that nobody told of the `model`."""
    _, guessed = guesses_of(model)
    if guessed:
        log.warning(
            "nobody says how the model's images are prepared, so those of %s are prepared by a guess: %s. Give input={...}",
            source, described(model_transform(model).config, guessed),
        )  # fmt: skip


def _say_guesses(session: Session) -> None:
    """Warn of what was guessed of a model of another library, but for its images: whoever gives a loader prepared them."""
    for note in guesses_of(session.dense)[0]:
        if UNSAID not in note:
            log.warning("%s", spoken(note, {"num_classes": "num_classes"}))


def _say_preparation(prepared: InputConfig | None, session: Session) -> None:
    """Warn where a device would prepare images otherwise than the loader does, or where that is not known."""
    transform, (_, guessed) = session.transform, guesses_of(session.dense)
    unlike = differences(prepared, transform) if prepared is not None else []
    session.unlike = unlike or ([f"guessed: {described(transform.config, guessed)}"] if guessed else [])
    if unlike:
        log.warning(
            "the loader prepares images by %s as the model's description says; a bundle's runner follows the description: give "
            "input={...}, or change the loader", "; ".join(unlike),
        )  # fmt: skip
    elif prepared is None and guessed:
        log.warning(
            "nobody says how the images were prepared, and a bundle's runner must do the same; guessed: %s. Give input={...}",
            described(transform.config, guessed),
        )


def spec_of(
    model: nn.Module | str, num_classes: int | None = None, input: InputConfig | Mapping[str, Any] | None = None,
    seen: Seen | None = None,
) -> ModelSpec:  # fmt: skip
    """The `ModelSpec` of a model: what `load_model` loaded it by, while it is still that model; else one that holds the module
    itself, by which an artifact is opened with that module alone. `seen` completes the `input` of such a one."""
    if isinstance(model, str):
        told = [name for name, value in (("num_classes", num_classes), ("input", input)) if value is not None]
        if told:
            raise UserError(
                f"{' and '.join(told)} of a model that is named ({shown(model, quoted=False)}) would not be obeyed: give the "
                "model of moee.load_model, which takes num_classes and img_size"
            )
        return named_model(model, ModelOptions(pretrained=True), log.info)
    if num_classes is not None:
        whole("num_classes", num_classes, CLASSES)
    module = plain(model, type(getattr(model, "_orig_mod", model)).__name__)
    source = getattr(module, SOURCE, None)
    if source is not None and num_classes in (None, getattr(module, "num_classes", None)) and input is None:
        spec, before = source
        changed = before.differences(module)
        if not changed:
            return spec
        log.info("%s was changed since load_model (%s): it is taken as a module of your own", spec.called, changed)
    given = input if isinstance(input, InputConfig) or input is None else validated(InputConfig, dict(input))
    return with_pretrained(module_spec(module, num_classes, given if seen is None else seen.completed(given, module)))


def source_of(data: Images, val: Images) -> tuple[str, tuple[Any, Any] | None]:
    """The name of a source, or what stands for one in Python. Raises `UserError` for held-out images beside a name."""
    if isinstance(data, (str, Path)):
        if val is not None:
            raise UserError("held-out images go with training images given in Python; a folder or a named source has its own")
        return os.fspath(data), None
    return "", (data, val)


def bytes_of(memory: int | str | None) -> int | None:
    """The most memory that a process may take, as Python says it: bytes, or text such as `8G`; None for no bound."""
    return None if memory is None else size("memory", memory)


def class_names(classes: Any) -> tuple[str, ...]:
    """Names that differ, or none. Raises `UserError` for others."""
    names = classes if isinstance(classes, (list, tuple)) else None
    if names is None or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise UserError(f"classes came as {shown(classes)}; expected a list of names that differ")
    return tuple(names)
