"""From what a user names, a model and a file of weights, to the `ModelSpec` that every later command works by."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from moee.errors import UserError
from moee.interface.adapted import guesses_of
from moee.interface.spec import InputConfig, WeightsPart
from moee.libraries import from_python, from_torchvision, from_transformers
from moee.libraries.library import Named
from moee.models.input_size import sized
from moee.models.model import LIBRARIES, ModelSpec, build_model, check_arguments, check_numbers, load_model, state_sha256
from moee.models.training_args import as_trained
from moee.schema import shown
from moee.weights.difference import image_size
from moee.weights.fitting import Fit, alternatives, best_fit, classes_of, holds_head, listed
from moee.weights.hub import CONFIG, find_folder, source_of
from moee.weights.loading import classifier_names, refuse_misfit
from moee.weights.weights_file import checkpoint_sha256, containers, read_checkpoint

OTHERS: tuple[tuple[Callable[[str], bool], Callable[[str, dict[str, Any]], Named]], ...] = (
    (lambda name: name.startswith(from_torchvision.PREFIX), from_torchvision.named),
    (lambda name: name.startswith(from_transformers.PREFIX), from_transformers.named),
    (from_python.is_function_name, from_python.named),
)


@dataclass(frozen=True)
class ModelOptions:
    """What a user says of a model beside its name: where its weights come from, and its arguments as timm has them."""

    pretrained: bool = False
    checkpoint: str | None = None
    random_weights: int | None = None
    num_classes: int | None = None
    in_chans: int | None = None
    img_size: Sequence[int] | None = None  # height and width, or one number for both
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        """The flags that were given of those that name weights."""
        given = {"--pretrained": self.pretrained, "--checkpoint": self.checkpoint, "--random-weights": self.random_weights}
        return [flag for flag, value in given.items() if value is not None and value is not False]

    def arguments(self) -> dict[str, Any]:
        """timm's arguments, without the size of the images. Raises `UserError` for one that is given twice."""
        own = {"num_classes": self.num_classes, "in_chans": self.in_chans, "img_size": self.img_size}
        own = {name: value for name, value in own.items() if value is not None}
        for name in own.keys() & self.model_kwargs.keys():
            raise UserError(f"--{name.replace('_', '-')} and --model-kwargs both give {name}; leave one out")
        return {**self.model_kwargs, **{name: value for name, value in own.items() if name != "img_size"}}


def named_spec(
    name: str, arguments: dict[str, Any], say: Callable[[str], None] = lambda note: None
) -> tuple[ModelSpec, Path | None]:
    """The model `name` without weights yet, and the file of weights that it brings: for `local-dir:FOLDER`, `hf-hub:ID` and
    `hf:FOLDER`, whose configuration is under `arguments`; None for a name of timm or torchvision, and a function of the user's.
    `say` gets sentences about what was taken.

    Raises `UserError` for an unknown name, arguments that cannot be recorded, or a folder that is none of a model.
    """
    try:
        arguments = json.loads(json.dumps(arguments, allow_nan=False))  # as later commands read them: lists, no tuples
    except (TypeError, ValueError) as error:
        raise UserError(f"model arguments {shown(arguments)}: expected numbers, texts, lists and None") from error
    for fits, named in OTHERS:
        if fits(name):
            found = named(name, arguments)
            for note in found.notes:
                say(note)
            return found.spec, found.weights
    source = source_of(name)
    if source is None:
        spec = ModelSpec(name=name, timm_name=name, kwargs=arguments)
        check_arguments(spec)
        return spec, None
    folder = find_folder(*source)
    given = {key: folder.input.get(key) for key in InputConfig.model_fields}
    try:
        config = InputConfig(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{folder.weights.parent}: {where} of the model's configuration: {first['msg']}") from error
    check_numbers(folder.arguments, folder.weights.parent / CONFIG)
    labels, obstacle = folder.labels()
    if obstacle:
        say(f"{obstacle}, so class numbers are guessed; --class-map FILE gives their order")
    kwargs = {**folder.arguments, **arguments}
    spec = ModelSpec(name=name, timm_name=folder.architecture, kwargs=kwargs, input=config, labels=labels)
    check_arguments(spec)
    return spec, folder.weights


def guesses(spec: ModelSpec) -> tuple[str, ...]:
    """Sentences about what was guessed of a model of another library than timm; it is laid out for them."""
    if spec.library == "timm":
        return ()
    with torch.device("meta"):
        model = build_model(spec)
    return guesses_of(model)[0]


def _with_classes(spec: ModelSpec, count: int) -> ModelSpec:
    return spec.model_copy(update={"kwargs": {**spec.kwargs, "num_classes": count}})  # labels of another count are said later


def with_file(spec: ModelSpec, path: Path) -> tuple[ModelSpec, list[str]]:
    """`spec` with its weights from a checkpoint, and sentences for the user: what was taken, what was guessed.

    The number of classes is the checkpoint's unless `spec.kwargs` has one. A checkpoint without a classifier makes a model of
    features alone (`num_classes` 0): a classifier drawn at random would be none. Works on shapes: no model takes memory. Raises
    `UserError` that says what differs and which flag mends it.
    """
    content = read_checkpoint(path)
    found = containers(content, path)
    spec, trained = as_trained(spec, content, path.name)
    with torch.device("meta"):
        model = build_model(spec)
    classifier = classifier_names(model)
    fit = best_fit(found, model, classifier)
    told, wanted = classes_of(fit.state, classifier), getattr(model, "num_classes", 0)
    asked = spec.kwargs.get("num_classes")
    notes: list[str] = []
    if 2 * len(fit.fitting) > len(model.state_dict()) and classifier and LIBRARIES[spec.library].takes_classes(spec):
        if asked is None and told != wanted and (told or not holds_head(fit.state, classifier)):  # a part of one is refused
            spec = _with_classes(spec, told)
            with torch.device("meta"):
                model = build_model(spec)
            fit = best_fit(found, model, classifier)
        elif asked and told and asked != told:
            raise UserError(
                f"checkpoint {path} has {told} classes, --num-classes says {asked}: leave --num-classes out or give {told}"
            )
        if not told and wanted and asked is None:
            notes.append(_no_classifier(path.name, classifier, [name for name, _ in found if name not in ("", fit.container)]))
        elif not asked and told and asked is not None:
            notes.append(f"the classifier of {path.name} ({told} classes) is left out, as --num-classes 0 asks")
        elif asked is None and told != wanted:
            notes.append(f"{told} classes, as the classifier of {path.name} has")
    try:
        refuse_misfit(fit, model, path, spec.called, content)
    except UserError as error:
        cures = [note for note in trained if "--model-kwargs" in note]  # the likeliest reason
        raise UserError("; ".join([str(error), *cures])) from error
    notes = [f"{path.name}: {fit.sentence()}", *notes, *trained]
    others = alternatives(found, model, classifier, fit)
    if others:
        own = ".".join(word for word in (fit.container, fit.prefix.removesuffix(".")) if word) or "the file's own tensors"
        notes.append(
            f"{path.name} holds other weights that fit as well: {listed(others)}; {shown(own, quoted=False)} is taken. To take "
            "others, save them alone"
        )
    size = _trained_size(fit, model)
    if size is not None and "img_size" not in spec.kwargs:
        notes.append(f"{path.name} was trained on {size} x {size} pixels; --img-size {size} keeps them")
    part = WeightsPart(container=fit.container, prefix=fit.prefix)
    place = os.path.abspath(path)  # for later commands, which may run in another folder
    return spec.model_copy(update={"weights": place, "weights_sha256": checkpoint_sha256(path), "part": part}), notes


def _no_classifier(file: str, classifier: tuple[str, ...], others: list[str]) -> str:
    beside = f", and its other parts are not read ({listed(others)})" if others else ""
    return (
        f"{file} has no classifier under the model's name of it ({listed(classifier)}){beside}: features are compared, with a "
        "probe where images are labelled"
    )


def _trained_size(fit: Fit, model: torch.nn.Module) -> int | None:
    before = fit.resized.get("pos_embed")
    return image_size(before[0], model) if before else None


def with_pretrained(spec: ModelSpec) -> ModelSpec:
    """`spec` with its library's pretrained weights and their hash, so that another download under the same name is noticed.

    Raises `UserError` for a number of classes that they do not have: a classifier would be drawn at random.
    """
    told, asked = LIBRARIES[spec.library].pretrained_classes(spec), spec.kwargs.get("num_classes")
    if asked and told is not None and told != asked:
        raise UserError(
            f"the pretrained weights of {spec.called} have {told} classes, --num-classes says {asked}: leave it "
            "out, or give 0 to compare features"
        )
    return _with_hash(spec.model_copy(update={"pretrained": True}))


def with_random(spec: ModelSpec, seed: int, say: Callable[[str], None] = lambda text: None) -> ModelSpec:
    """`spec` with weights drawn under `seed`, and their hash, so that a machine that draws others is noticed. `say` is told of a
    head, which nothing has trained."""
    drawn = spec.model_copy(update={"random_seed": seed})
    model = load_model(drawn)
    classes = int(getattr(model, "num_classes", 0) or 0)
    if classes:
        say(f"its head of {classes:,} classes is random, so accuracy means nothing; --num-classes 0 compares features")
    return drawn.model_copy(update={"weights_sha256": state_sha256(model, drawn)})


def _with_hash(spec: ModelSpec) -> ModelSpec:
    return spec.model_copy(update={"weights_sha256": state_sha256(load_model(spec), spec)})


def named_model(name: str, options: ModelOptions, say: Callable[[str], None]) -> ModelSpec:
    """The `ModelSpec` of a model name with its weights: a timm name, `local-dir:FOLDER` or `hf-hub:ID`, `torchvision:NAME`,
    `hf:FOLDER`, or a function `package.module:function`, which brings its weights unless told otherwise. `say` gets sentences
    about what was taken and guessed.

    Raises `UserError` unless exactly one source of weights is given for a timm name.
    """
    given = options.sources
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each name the weights of {shown(name, quoted=False)}; give one of them")
    spec, own = sized_model(name, options, say)
    if options.random_weights is not None:
        return with_random(spec, options.random_weights, say)
    path = options.checkpoint if options.checkpoint is not None else own
    if options.pretrained and spec.library == "hf":
        raise UserError(f"--pretrained: {shown(name, quoted=False)} brings its weights; leave it out")
    if (options.pretrained and own is None) or (path is None and spec.library == "python"):
        return with_pretrained(spec)
    if path is None and spec.library == "hf":
        raise UserError(f"{shown(name, quoted=False)} holds no weights: give --checkpoint FILE or --random-weights SEED")
    if path is None:
        of = "torchvision's" if spec.library == "torchvision" else "timm's"
        raise UserError(
            f"{shown(name, quoted=False)} has no weights yet: give --pretrained for {of}, --checkpoint FILE for yours, or "
            "--random-weights SEED to draw them at random"
        )
    spec, notes = with_file(spec, Path(path))
    for note in notes:
        say(note)
    return spec


def sized_model(name: str, options: ModelOptions, say: Callable[[str], None]) -> tuple[ModelSpec, Path | None]:
    """The model without weights, at the size that is asked for; and the weights that its name brings."""
    spec, own = named_spec(name, options.arguments(), say)
    if options.img_size is not None:
        spec = sized(spec, options.img_size)
    for note in guesses(spec):
        say(note)
    return spec, own
