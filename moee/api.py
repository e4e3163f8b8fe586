"""The Python interface: extraction, fine-tuning and evaluation of any `nn.Module` on any loader of images.

    import moee
    model = moee.load_model("vit_small_patch16_224", pretrained=True)   # or a module of your own
    result = moee.extract(model, train_loader, val_loader, preset="static", keep=0.7)
    moee.save(result, "runs/extracted")

These are the functions of the command line without its files: what they take and give is in memory. `exporter` has the others.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from moee.artifacts import checkpoint
from moee.artifacts.loaded import Loaded
from moee.artifacts.model import MoeeModel, recorded_data
from moee.bounds import JOBS, WORKERS, whole
from moee.config import FinetuneConfig, validated
from moee.data.image_set import ImageSet
from moee.data.sources import same_data
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.given.images import given_images
from moee.interface.spec import InputConfig
from moee.keywords import in_python
from moee.measure.accuracy import comparison
from moee.measure.evaluation import Retention, retention, run
from moee.measure.probe import classes_told, head_drawn
from moee.methods.idle import refuse_idle_options
from moee.methods.recipe import make_recipe, read_recipe, tuning_of
from moee.methods.registry import METHODS
from moee.models.model import load_model as load_spec
from moee.models.source import ModelOptions, named_model
from moee.parallel.joining import alone
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder, resume_folder
from moee.places.placement import check_all
from moee.places.resume import alone_on
from moee.progress import Reporter, to_stderr
from moee.schema import shown
from moee.shrinking.options import ShrinkConfig
from moee.shrinking.shrink import mixtures_of
from moee.stages.extract import run_extract
from moee.stages.finetune import tune
from moee.stages.opened import SOURCE, Images, bytes_of, class_names, say_guessed_preparation, session_of, source_of
from moee.stages.session import Session
from moee.stages.shrink import shrink_with
from moee.store.result_kinds import FINETUNE_STATE, MODEL
from moee.store.scratch import temporary_folder

log = logging.getLogger("moee")
INPUT_SIZE = "input={'input_size': (channels, height, width)}"
OF_INPUT = {name: f"{name} of input=" for name in InputConfig.model_fields}
SCRATCH = {"scratch": "TMPDIR=DIR"}  # a flag of the command line; Python has the environment


@in_python()
def load_model(
    name: str, *, pretrained: bool = False, checkpoint: str | Path | None = None, random_weights: int | None = None,
    num_classes: int | None = None, in_chans: int | None = None, img_size: int | tuple[int, int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:  # fmt: skip
    """A dense model by its name: timm's, `torchvision:NAME`, `hf:FOLDER`, `local-dir:FOLDER`, `hf-hub:ID` or
    `package.module:function`; in eval mode, float32, on the CPU.

    The weights are those of the file `checkpoint`, timm's `pretrained` ones, or drawn under the seed `random_weights`; the number
    of classes is the file's by default. `img_size` is in pixels, height and width or one number for both. What was taken and
    guessed is logged. Raises `UserError` for an unknown name, weights that do not fit, or none.
    """
    sides = [img_size] if isinstance(img_size, int) else list(img_size) if img_size is not None else None
    path = None if checkpoint is None else os.fspath(checkpoint)
    options = ModelOptions(pretrained, path, random_weights, num_classes, in_chans, sides, dict(model_kwargs or {}))
    spec = named_model(name, options, log.info)
    model = load_spec(spec)
    setattr(model, SOURCE, (spec, Loaded.of(model)))
    return model


@in_python([name for method in METHODS for name in method.options.model_fields], {"img_size": INPUT_SIZE, **OF_INPUT, **SCRATCH})
def extract(
    model: nn.Module | str, data: Images, val: Images = None, *, method: str | None = None, preset: str | None = None,
    recipe: str | Path | None = None, classes: Sequence[str] = (), num_classes: int | None = None,
    input: InputConfig | Mapping[str, Any] | None = None, out: str | Path | None = None, force: bool = False,
    device: str = "auto", jobs: int = 1, workers: int = 0, memory: int | str | None = None, report: Reporter | None = None,
    **options: Any,
) -> MoeeModel:  # fmt: skip
    """Cut the MLPs of `model`, found on the images `data`, and measure the result on the held-out images `val`.

    `model` is a `torch.nn.Module`, which stays as it is, or a name with pretrained weights. `data` and `val`: a DataLoader, a
    dataset, or an iterable of (images [B, C, H, W] as the model takes them, labels [B]); or a source of the command line, such
    as a folder of images. Without `val` a fifth of `data` is held out. `method`: `experts` (the default), `static`,
    `moefication`, `clear-moe`, `corp`, `lowrank` or `tokens`; `options` are its options, such as `keep` and `target_macs`,
    `attention_macs` of narrower heads and `token_macs` of merged tokens: `moee extract --method NAME --help` lists them.
    `recipe`: a TOML file that says both instead. `classes` orders the class names. `num_classes` says how many classes a module
    tells apart, 0 for features, where it does not say it; `input` how its images are prepared. `out`: a folder to write the
    artifact to. `device`: `auto`, `cuda`, `cuda:1` or `cpu`. `memory`: the most that the process may take, such as `"8G"` or
    bytes; the work is cut into smaller pieces, or refused before it begins.

    Raises `UserError` for bad input. Deterministic for the same model, images and options.
    """
    report = report or to_stderr()
    whole("jobs", jobs, JOBS)
    whole("workers", workers, WORKERS)
    if recipe is not None:
        taken = [name for name, value in (("method", method), ("preset", preset)) if value is not None] + list(options)
        if taken:
            raise UserError(f"recipe decides the methods and their options; leave {', '.join(taken)} out")
        steps = read_recipe(_recipe_path(recipe))
        if steps.tune is not None:
            log.info("the recipe tunes the model too: moee.finetune(result, recipe=%r)", str(recipe))
    else:
        steps = make_recipe(method, preset, _tuples(options))
        refuse_idle_options(steps, options)
    session = session_of(
        model, data, val, classes=classes, num_classes=num_classes, input=input, device=device, workers=workers, report=report,
        seed=steps.seed, memory=memory,
    )  # fmt: skip
    return run_extract(
        session.spec, session.source, steps, out, force=force, report=report, session=session, jobs=jobs, workers=workers,
        classes=class_names(classes),
    )  # fmt: skip


@in_python(FinetuneConfig.model_fields)
def finetune(
    model: MoeeModel, data: Images = None, val: Images = None, *, recipe: str | Path | None = None,
    out: str | Path | None = None, force: bool = False, device: str = "auto", workers: int = 0,
    memory: int | str | None = None, report: Reporter | None = None, **options: Any,
) -> MoeeModel:  # fmt: skip
    """A copy of `model` into which its dense model was distilled on the images `data` (default: what it was made on).

    `options` are the fields of `moee.config.FinetuneConfig`, such as `epochs`, `lr` and `distil`; `recipe` is a TOML file whose
    `[tune]` says them instead. `data`, `val` and `memory` as for
    `extract`. With `out` the artifact is written there, and an interrupted run leaves its state in `<out>.resume`, where the same
    call goes on. Raises `UserError` for bad input, and for images whose probe was fitted on others.
    """
    report, bound = report or to_stderr(), bytes_of(memory)
    whole("workers", workers, WORKERS)
    config = validated(FinetuneConfig, options)
    if recipe is not None:
        if options:
            raise UserError(f"recipe decides how it is tuned; leave {', '.join(options)} out")
        config = tuning_of(_recipe_path(recipe))
    if data is None:
        data = recorded_data(model.data)
    source, given = source_of(data, val)
    if model.probe is not None and given is None and not same_data(source, model.data):
        raise UserError(f"the probe was fitted on {model.data}, so the model cannot be tuned on {source}; extract on {source}")
    inputs = source_paths(source, model.spec.weights) if given is None else source_paths(model.spec.weights)
    if out is not None:
        state = resume_folder(out, FINETUNE_STATE, inputs)
        check_all([OutputFolder(out, MODEL, force, inputs), state])
    seed = model.seed
    with alone_on(state.place) if out is not None else nullcontext():
        session = Session(
            model.dense_spec, source, seed=seed, report=report, group=alone(device), workers=workers, classes=model.classes,
            given=given, memory=bound,
        )  # fmt: skip
        if given is None:
            say_guessed_preparation(session.dense, session.source)
        tuned = replace(model, model=copy.deepcopy(model.model), info=copy.deepcopy(model.info))
        with nullcontext(state.place) if out is not None else temporary_folder() as place:
            tune(tuned, session, config, Path(place), out, force=force, inputs=inputs)
        if out is not None:
            state.remove()
    return tuned


@in_python(ShrinkConfig.model_fields, SCRATCH)
def shrink(
    model: MoeeModel, data: Images = None, val: Images = None, *, out: str | Path | None = None, force: bool = False,
    device: str = "auto", workers: int = 0, memory: int | str | None = None, report: Reporter | None = None, **options: Any,
) -> MoeeModel:  # fmt: skip
    """A copy of `model` with fewer experts, by what it computes on the images `data` (default: what it was made on).

    `options` are the fields of `moee.shrinking.options.ShrinkConfig`: `experts` merges down to so many, `specialise` drops those
    that the images do not need. `data`, `val` and `memory` as for `extract`. With `out` the artifact is written there. Raises
    `UserError` where there are no experts to make fewer, and for bad input.
    """
    report, bound = report or to_stderr(), bytes_of(memory)
    whole("workers", workers, WORKERS)
    config = validated(ShrinkConfig, options)
    mixtures_of(model.model, config)
    source, given = source_of(recorded_data(model.data) if data is None else data, val)
    inputs = source_paths(source, model.spec.weights) if given is None else source_paths(model.spec.weights)
    if out is not None:
        OutputFolder(out, MODEL, force, inputs).check()
    session = Session(
        model.dense_spec, source, seed=model.seed, report=report, group=alone(device), workers=workers, classes=model.classes,
        given=given, memory=bound,
    )  # fmt: skip
    if given is None:
        say_guessed_preparation(session.dense, session.source)
    smaller = replace(model, model=copy.deepcopy(model.model), info=copy.deepcopy(model.info))
    shrink_with(smaller, session, config, out, force=force, inputs=inputs)
    return smaller


@in_python()
def evaluate(model: MoeeModel, data: Images = None, *, device: str = "auto", report: Reporter | None = None) -> Retention:
    """How much of its dense model `model` retains on the held-out images `data` (default: those it was made on).

    Accuracies with 95 % intervals where they can be compared, else the reason; cosines of the outputs and of single tokens.
    """
    report = report or to_stderr()
    dense = model.dense()
    held_out = held_out_images(model, data, report)
    group = alone(device)
    reference = run(dense, held_out, report, "dense", group=group)
    outputs = run(model.model, held_out, report, "MoEE", group=group)
    logits = reference.features if model.probe is None else model.probe.logits(reference.features)
    told = classes_told(dense, model.probe)
    drawn = head_drawn(model.spec, model.probe)
    compared = comparison(
        reference.labels, held_out.num_classes, told, held_out.name, logits=logits, drawn=drawn, probe=model.probe is not None,
        unknown=held_out.unknown,
    )  # fmt: skip
    return retention(reference, outputs, model.probe, told, compared)


@in_python(renamed={"out": "path"})
def save(model: MoeeModel, path: str | Path, *, force: bool = False) -> None:
    """Write `model` as an artifact, a folder, atomically. Raises `UserError` if `path` exists and `force` is off, or if it holds
    anything but an earlier artifact."""
    checkpoint.save(model, path, force, source_paths(model.spec.weights))


@in_python()
def load(path: str | Path, model: nn.Module | str | None = None) -> MoeeModel:
    """Read an artifact. `model`: the dense model that it was made from, where that was a module of your own, or the name
    `package.module:function` of one; its weights are compared with the recorded hash.

    Raises `UserError` for a damaged or foreign artifact, another model, and a module that is needed and missing.
    """
    return checkpoint.load(path, model)


def held_out_images(model: MoeeModel, data: Images = None, report: Reporter | None = None) -> ImageSet:
    """The held-out images that `data` means for `model`: a source of the command line, or images given in Python."""
    report = report or to_stderr()
    if data is None or isinstance(data, (str, Path)):
        if data is not None:
            say_guessed_preparation(model.model, os.fspath(data))
        return model.record.images("val", None if data is None else os.fspath(data), report)
    transform = model_transform(model.model)
    told = classes_told(model.model, model.probe) or None
    return given_images(data, shape=transform.shape, classes=model.classes or None, head_classes=told, report=report)


def _recipe_path(recipe: Any) -> str | Path:
    if not isinstance(recipe, (str, Path)) or not str(recipe).strip():
        raise UserError(f"recipe came as {shown(recipe)}; expected the path of a TOML file")
    return recipe


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options whose lists are tuples, as the command line gives them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


