"""What `moee.json` must hold: figures of each stage, and a record of every layer. Checked before anything is built from it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from moee.data.class_names import MAX_CLASSES
from moee.interface.spec import Finite
from moee.kinds.attention_records import AttentionRecord
from moee.kinds.merging_records import MergingRecord
from moee.models.model import ModelSpec
from moee.schema import Body, Text

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class Retention(Body):
    """A stage's figures; any may lack, or be no number where the model is broken. Accuracies are of `labelled` images."""

    model_config = ConfigDict(allow_inf_nan=True)

    dense_accuracy: float | None = None
    accuracy: float | None = None
    top1_agreement: float | None = None
    class_cosine: float | None = None
    token_cosine: float | None = None
    images: int | None = Field(None, ge=0)
    labelled: int | None = Field(None, ge=0)
    dense_accuracy_interval: Interval | None = None
    accuracy_interval: Interval | None = None
    drop_interval_pp: Interval | None = None
    no_accuracy: Text = ""
    probe: bool = False


class Cost(Body):
    macs: float = Field(gt=0)
    params: float = Field(gt=0)


class Costs(Body):
    dense: Cost
    moee: Cost


class Stage(Body):
    """What a command measured, on the held-out images of `data`: `shares` are those of each layer's tokens that each expert
    got. `data` is empty where the stage did not record it: then it is the artifact's. `held_out` is a hash of those images."""

    data: Text = ""
    held_out: Text = ""
    retention: Retention = Retention()
    cost: Costs | None = None
    shares: dict[str, list[Annotated[float, Field(ge=0, le=1.001)]]] = {}

    @model_validator(mode="after")
    def _whole(self) -> Stage:
        if "retention" in self.model_fields_set and self.cost is None:
            raise ValueError("a stage that was measured has its cost too")
        return self


def whole_stages(stages: dict[str, Any]) -> dict[str, Any]:
    """Checked stages with every figure of what was measured: one that lacks is None, and shown as not known."""
    empty = Retention().model_dump()
    return {
        name: {**stage, "retention": {**empty, **stage["retention"]}} if "retention" in stage else stage
        for name, stage in stages.items()
    }


class Licence(Body):
    """Of the base model's weights, and who says so (`moee.models.licence`)."""

    name: Text
    stated_by: Text


# Outputs of a model of someone's own code on random images (`moee.artifacts.answers`)
Answers = Annotated[list[Annotated[list[Finite], Field(min_length=1, max_length=64)]], Field(max_length=8)]


class Info(Body):
    answers: Answers = []
    stages: dict[str, Stage] = {}
    layers: list[dict[str, Any]] = []
    licence: Licence | None = None


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) != len(names):
        raise ValueError("expected names that differ")
    return names


# what labels are numbered by: written into configurations of other programs, hence checked as texts
Classes = Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=MAX_CLASSES), AfterValidator(_distinct)]


class Manifest(Body):
    """The body of `moee.json`."""

    model: ModelSpec
    recipe: dict[str, Any] | None
    data: Text
    classes: Classes = []
    layers: list[dict[str, Any]]
    attention: list[AttentionRecord] = []
    merging: MergingRecord | None = None
    info: Info

    @model_validator(mode="after")
    def _changed(self) -> Manifest:
        if not self.layers and self.merging is None:
            raise ValueError("expected layers, or merging")
        return self
