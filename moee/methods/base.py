"""What a method that cuts a model is to the rest of the project. `moee.methods.registry` lists them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from torch import nn

from moee.calibrate.calibration import LayerTokens
from moee.config import Options
from moee.data.image_set import ImageSet
from moee.layers.report import LayerReport
from moee.parallel.group import SOLO, Group
from moee.progress import Reporter, silent

Chosen = TypeVar("Chosen", bound=Options)
Shares = Literal["tokens", "groups", "nothing"]
Part = Literal["attention", "mlps"]
Values = Mapping[str, Any]  # of options, by their names


@dataclass(frozen=True)
class Context:
    """What a method works with: the calibration images, where it reports progress, the ranks that share the work (and their
    devices), how many layers are clustered side by side, tokens that an earlier calibration of the same model collected, where
    calibration tokens lie (a temporary folder of their own by default), and what a method leaves for its next call on the same
    dense model and data."""

    data: ImageSet
    report: Reporter = silent
    group: Group = SOLO
    jobs: int = 1
    sampled: Sequence[LayerTokens] | None = None
    scratch: Path | None = None
    left: dict[Any, Any] = field(default_factory=dict)

    def of(self, sampled: Sequence[LayerTokens] | None) -> Context:
        """The same with other tokens."""
        return replace(self, sampled=sampled)


@dataclass(frozen=True)
class Variant:
    """A way of a method that a plan tries: its `values`, and whether a plan tries it when nobody says which."""

    values: Values
    usual: bool = True


class Method(ABC, Generic[Chosen]):
    """A way to cut a model.

    `name`: in recipes and after `--method`; `also`: older names. `summary`: one line for help. `options`: the model of its
    options, whose descriptions are the help. `cuts`: which part of the model; attention comes before MLPs. `gated`: whether it
    cuts gated MLPs too. `shares`: what models of different budgets have in common, so that a plan makes it once: the calibration
    tokens, the groups of a layer's tokens, or nothing. `presets`: named values. `variants`: what a plan tries. `allocations`: the
    values with which it spends a plan's budget, by name.
    """

    name: ClassVar[str]
    also: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str]
    options: ClassVar[type[Options]]
    cuts: ClassVar[Part] = "mlps"
    gated: ClassVar[bool] = False
    shares: ClassVar[Shares] = "nothing"
    presets: ClassVar[Mapping[str, Values]] = {}
    variants: ClassVar[Mapping[str, Variant]] = {}
    allocations: ClassVar[Mapping[str, Values]] = {"": {}}

    @abstractmethod
    def convert(self, model: nn.Module, options: Chosen, context: Context) -> Sequence[LayerReport]:
        """Replace layers of `model` in place; one report an MLP, of rank 0 alone where ranks share the work. Raises `UserError`
        for input that it cannot work with."""

    def changes(self, options: Chosen) -> bool:
        """Whether the options ask for anything at all."""
        return True

    def budget(self, options: Chosen) -> float | None:
        """Share of the model's MACs that cutting its MLPs must reach, where that can be held against the model before any work;
        None where nothing of the kind is asked."""
        return None

    def within(self, options: Chosen, target: float, model: nn.Module, shape: tuple[int, int, int]) -> Chosen:
        """Options with which the result costs the share `target` of the dense MACs. `model` is what the method starts from, on
        images of `shape`. Raises `OutOfReach` if it cannot."""
        return options.model_copy(update={"target_macs": target})
