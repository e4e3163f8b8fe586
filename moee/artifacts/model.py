"""A model with replaced layers in memory, and how its images are read again."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moee.artifacts.trained_on import trained_on
from moee.cures import cures
from moee.data import sources
from moee.data.image_set import Division, ImageSet
from moee.data.transform import Transform, model_transform
from moee.errors import UserError
from moee.given.datasets import PREFIX
from moee.measure.probe import Probe
from moee.methods.recipe import Recipe
from moee.models.model import ModelSpec, build_model, load_model
from moee.progress import Reporter, silent
from moee.schema import shown

log = logging.getLogger("moee")
Divisions = tuple[tuple[str, Division], ...]  # by the name of the data


@dataclass(frozen=True)
class ImageRecord:
    """How the images of an artifact are read again: `source` divided with the `seed` that it was made with, numbered by its
    `classes`, or, where it records none, to fit the `head_classes` that the model tells apart. `divisions` are what sources were
    divided from when its stages were made, as far as that is known; `made_on` is the data of its stages."""

    source: str
    transform: Transform
    seed: int
    classes: tuple[str, ...]
    head_classes: int | None
    divisions: Divisions = ()
    made_on: tuple[str, ...] = ()

    def images(self, split: str, given: str | None = None, report: Reporter = silent) -> ImageSet:
        """The `train` or `val` images of what the artifact was made on, or in its stead of the source `given`. Raises `UserError`
        for one that cannot be read, and as `recorded_data`."""
        source = given or recorded_data(self.source)
        data = sources.load_data(
            source, self.transform, split, self.seed, self.classes or None, head_classes=self.head_classes, report=report
        )
        self._check(source, data)
        if split == "val":
            self.told(source, data, report)
        return data

    def splits(self, given: str | None = None, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
        """The training and the held-out images, as `images`."""
        source = given or recorded_data(self.source)
        train, val = sources.load_splits(
            source, self.transform, self.seed, self.classes or None, self.head_classes, report=report
        )
        self._check(source, val)
        train.notes = (*train.notes, *self.told(source, val, report))
        return train, val

    def _check(self, source: str, data: ImageSet) -> None:
        check_divisions(self.divisions, source, data)

    def told(self, source: str, held_out: ImageSet, report: Reporter = silent) -> list[str]:
        """What is to be said of `held_out` images of a `source` that stages were made with; they have it in their notes then."""
        notes = trained_on(self.made_on, source, held_out, self.transform, self.seed, report=report)
        held_out.notes = (*held_out.notes, *notes)
        return notes


@dataclass(repr=False)
class MoeeModel:
    """A model with routed layers and everything that an artifact records about it.

    `info` is free-form: the commands' results, such as metrics and per-layer reports. `recipe`: how it was made; None for
    artifacts that nobody extracted. `classes` name what the outputs (the
    probe's, where there is one) stand for; none where that is not known.
    """

    model: nn.Module
    spec: ModelSpec
    recipe: Recipe | None
    data: str
    probe: Probe | None = None
    info: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """One line, as a notebook shows it: what was cut, and the last stage's figures."""
        what = self.recipe.method.name if self.recipe else "not extracted"
        stages: list[dict[str, Any]] = list(self.info.get("stages", {}).values())
        stage = stages[-1] if stages else {}
        cost, kept = stage.get("cost"), stage.get("retention") or {}
        said = [self.spec.name, what]
        if cost:
            said.append(f"{cost['moee']['macs'] / cost['dense']['macs']:.1%} of the MACs")
        if kept.get("accuracy") is not None:
            said.append(f"accuracy {kept['accuracy']:.2%} (dense {kept['dense_accuracy']:.2%})")
        if kept.get("class_cosine") is not None:
            said.append(f"cosine {kept['class_cosine']:.4f}")
        return f"MoeeModel({', '.join(said)})"

    @property
    def dense_spec(self) -> ModelSpec:
        """The model that this one was extracted from. Raises `UserError` if nobody knows its weights any more."""
        if not self.spec.has_weights:
            raise UserError(
                f"the dense model of this artifact is lost: {self.spec.name} was drawn at random, and the seed was not recorded; "
                "extract again with --pretrained, --checkpoint FILE or --random-weights SEED"
            )
        return self.spec

    @property
    def record(self) -> ImageRecord:
        """How its images are read again."""
        transform, told = model_transform(self.model), head_classes(self.model)
        return ImageRecord(self.data, transform, self.seed, self.classes, told, self.divisions, self.made_on)

    @property
    def seed(self) -> int:
        """What its images were divided by."""
        return self.recipe.seed if self.recipe else 0

    @property
    def _stages(self) -> list[dict[str, Any]]:
        """What is recorded of every stage, those that a later one of the same name took the place of too."""
        stages = [stage for stage in self.info.get("stages", {}).values() if isinstance(stage, dict)]
        return stages + [before for stage in stages for before in stage.get("before", []) if isinstance(before, dict)]

    @property
    def made_on(self) -> tuple[str, ...]:
        """The names of the data of its stages."""
        names = [self.data, *(stage.get("data") for stage in self._stages)]
        return tuple(dict.fromkeys(name for name in names if isinstance(name, str)))

    @property
    def divisions(self) -> Divisions:
        """What the images of each of its stages were divided from, by the name of their data, as far as it was recorded."""
        found: list[tuple[Any, Division | None]] = [(self.data, recorded_division(self.info.get("data_read")))]
        for stage in self._stages:
            read = {"division": stage["division"]} if "division" in stage else stage.get("data_read")
            found.append((stage.get("data"), recorded_division(read)))
        return tuple((name, division) for name, division in found if isinstance(name, str) and division is not None)

    def check_images(self, source: str, train: ImageSet, held_out: ImageSet, report: Reporter = silent) -> None:
        """Raise `UserError` where `source` is data of one of its stages and changed, so that other images would be held out. Warn
        where held-out images of other data are training images of a stage, and note it."""
        check_divisions(self.divisions, source, train)
        for note in self.record.told(source, held_out, report):
            train.notes = (*train.notes, note)
            log.warning("%s", note)

    def take_weights(self, path: Path | str) -> None:
        """The dense model's weights have moved to `path`; their hash is compared when they are loaded. Raises `UserError` if they
        did not come from a file."""
        if self.spec.weights is None:
            raise UserError(f"--checkpoint {path}: the weights of this artifact's dense model came from no file; leave it out")
        self.spec = self.spec.model_copy(update={"weights": os.path.abspath(path)})

    def dense(self) -> nn.Module:
        """The unmodified model that this one was extracted from, with its weights."""
        return load_model(self.dense_spec)

    def layout(self) -> nn.Module:
        """The model that this one was extracted from, on the device meta: its shapes, without its weights."""
        with torch.device("meta"):
            return build_model(self.spec)


def head_classes(model: nn.Module) -> int | None:
    """How many classes the model's own head tells apart; None for one that ends in features."""
    return getattr(model, "num_classes", 0) or None


def recorded_data(source: str) -> str:
    """The data that a manifest names, as a default for `--data`. Raises `UserError` for a name that may be fetched from a
    network, which takes the user's own word, for images that were given in Python, and for a folder that is not there."""
    if source.startswith(PREFIX):
        given = shown(source.removeprefix(PREFIX))
        raise _not_read(f"the artifact's images were given in Python ({given})", "give some with --data")
    origin = sources.source_of(source)
    if origin.fetched:
        raise _not_read(f"the artifact names {shown(source)} as its data, which may be fetched", "say so with --data")
    path = origin.path(source)
    if os.path.isabs(path) and not os.path.exists(path):
        raise _not_read(f"the artifact was made on {shown(source)}, where no folder is now", "say where it lies with --data")
    return source


def _not_read(what: str, way: str) -> UserError:
    """The refusal, with the way out where there is such an option: a bundle takes no images."""
    cure = cures(way)
    return UserError(f"{what}; {cure}" if cure else what)


def check_divisions(divisions: Divisions, source: str, data: ImageSet) -> None:
    """Raise `UserError` where `source` was divided before, and changed so that other images would be held out."""
    for name, division in divisions:
        if sources.same_data(source, name):
            division.check(data)


def recorded_division(data_read: Any) -> Division | None:
    """What the images of an artifact were divided from, by the `data_read` of its manifest; None where nobody knows.
    Artifacts of before recorded how many were read alone."""
    if not isinstance(data_read, dict):
        return None
    if "division" in data_read:
        found = data_read["division"]
        known = isinstance(found, dict) and isinstance(found.get("images"), int) and isinstance(found.get("names"), str)
        return Division(found["images"], found["names"]) if known else Division(0)
    parts = [part for split in ("train", "val") if isinstance(part := data_read.get(split), dict)]
    counts = [n for part in parts if isinstance(n := part.get("images"), int) and n > 0]
    return Division(sum(counts)) if len(counts) == 2 else None
