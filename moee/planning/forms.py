"""Where and how models are timed, and what a device's times of each layer's forms say about the way to cut it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field
from torch import nn

from moee.schema import Body, checked
from moee.store.artifact import read_json, write_json

TYPICAL = 0.5  # of an MLP's neurons that a token takes, where forms are compared


class LayerChoices(Body):
    """What a device's times say of MLPs, by name. `one_expert`: no faster than dense with several experts, though faster with
    one. `exclude`: no faster in any form. `mac_times`: time of a MAC relative to the mean of all, where these differ."""

    one_expert: list[str]
    exclude: list[str]
    mac_times: dict[str, float] = Field(default_factory=dict)

    def values(self, excluded: tuple[str, ...], experts: int) -> dict[str, Any]:
        """The options of a step that say so; `excluded` are MLPs that stay dense in any case."""
        found: dict[str, Any] = {}
        if names := tuple(dict.fromkeys([*excluded, *self.exclude])):
            found["exclude"] = names
        if self.one_expert and experts > 1:
            found["one_expert"] = tuple(self.one_expert)
        if self.mac_times:
            found["mac_time"] = tuple(f"{name}={factor:g}" for name, factor in self.mac_times.items())
        return found


class LayerForms(Protocol):
    """A device's own times of the forms of each layer."""

    def predict(self, model: nn.Module, dense_ms: float) -> float:
        """Milliseconds of a model, of which the dense one takes `dense_ms`."""
        ...

    def choices(self, share: float, experts: int) -> LayerChoices:
        """What they say of MLPs whose tokens take `share` of the neurons, in so many experts. Raises `OutOfReach` where no MLP is
        faster than dense."""
        ...


@dataclass(frozen=True)
class Latency:
    """Where and how models are timed: `label` tells one way from another, `of(model)` gives {"kind", "dense_ms", "moee_ms"}.
    `forms`: what each form of each layer costs there, where that was measured."""

    label: str
    of: Callable[[nn.Module], dict[str, Any]]
    forms: LayerForms | None = None

    def timed(self, model: nn.Module) -> dict[str, Any]:
        """What the device says of a model, and what its layers' own times had predicted (`predicted_ms`)."""
        found = self.of(model)
        return found if self.forms is None else {**found, "predicted_ms": self.forms.predict(model, found["dense_ms"])}

    def choices(self, experts: int, store: Path) -> LayerChoices:
        """What the forms say of models with so many experts, kept in the folder `store`: times that are measured again differ,
        and so would the recipes. Nothing without forms."""
        if self.forms is None:
            return LayerChoices(one_expert=[], exclude=[])
        file = store / f"{hashlib.sha256(f'forms {self.label} {experts}'.encode()).hexdigest()[:16]}.json"
        if not file.is_file():
            write_json(file, self.forms.choices(TYPICAL, experts).model_dump())
        return checked(LayerChoices, read_json(file), file)
