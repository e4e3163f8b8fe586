"""What a method that cuts a model is to the rest of the project. `moee.methods.registry` lists them.

The file of a method imports its work where it does it: names, options and help are read without torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from moee.config import Options

if TYPE_CHECKING:  # a registry of names and options is read without torch, whose import takes seconds
    from torch import nn

    from moee.layers.report import LayerReport
    from moee.methods.context import Context

Chosen = TypeVar("Chosen", bound=Options)
Shares = Literal["tokens", "groups", "nothing"]
Part = Literal["attention", "tokens", "mlps"]
Values = Mapping[str, Any]  # of options, by their names


@dataclass(frozen=True)
class Variant:
    """A way of a method that a plan tries: its `values`, and whether a plan tries it when nobody says which."""

    values: Values
    usual: bool = True


@dataclass(frozen=True)
class Row:
    """A line of the ablation's table of methods: its `values`, and the values of each of its points; without a `sweep` the kept
    shares that the ablation asks for."""

    values: Values
    sweep: tuple[Values, ...] = ()


class Method(ABC, Generic[Chosen]):
    """A way to cut a model.

    `name`: in recipes and after `--method`; `also`: older names. `summary`: one line for help. `options`: the model of its
    options, whose descriptions are the help. `cuts`: which part of the model; attention comes before tokens, and these before
    MLPs. `gated`: whether it cuts gated MLPs too. `plugin`: whether its tokens are routed, which TensorRT needs a plugin for.
    `shares`: what models of different budgets have in common, so that a plan makes it once: the calibration tokens, the
    groups of a layer's tokens, or nothing. `calibrated`: whether it learns from training images, which takes most of the time;
    what does not is tried at many budgets first. `presets`: named values; the first ones are taken where none are named.
    `replaced`: the values of a preset that an option, once given, makes void. `counterparts`: options of other methods, and the
    option that says the same here. `variants`: what a plan tries. `allocations`: the values with which it spends a plan's
    budget, by name.
    """

    name: ClassVar[str]
    also: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str]
    options: ClassVar[type[Options]]
    cuts: ClassVar[Part] = "mlps"
    gated: ClassVar[bool] = False
    plugin: ClassVar[bool] = False
    shares: ClassVar[Shares] = "nothing"
    calibrated: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Values]] = {}
    replaced: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    counterparts: ClassVar[Mapping[str, str]] = {}
    variants: ClassVar[Mapping[str, Variant]] = {}
    allocations: ClassVar[Mapping[str, Values]] = {"": {}}

    @property
    def rows(self) -> Mapping[str, Row]:
        """Its lines in the ablation's table of methods."""
        return {self.name: Row({})} if self.cuts == "mlps" else {}

    @abstractmethod
    def convert(self, model: nn.Module, options: Chosen, context: Context) -> Sequence[LayerReport]:
        """Replace layers of `model` in place; one report an MLP, of rank 0 alone where ranks share the work. Raises `UserError`
        for input that it cannot work with."""

    def prepare(self, model: nn.Module, options: Chosen, context: Context) -> Any:
        """What models of all budgets have in common, where the method `shares` groups; `model` stays as it is."""
        raise NotImplementedError(f"{self.name} shares {self.shares}")

    def apply(self, model: nn.Module, prepared: Any, options: Chosen, context: Context) -> Sequence[LayerReport]:
        """As `convert`, from what `prepare` gave for a model like this one."""
        raise NotImplementedError(f"{self.name} shares {self.shares}")

    def changes(self, options: Chosen) -> bool:
        """Whether the options ask for anything at all."""
        return True

    def obstacle(self, options: Chosen, before: Sequence[str]) -> str:
        """Why it cannot come after steps of the methods `before`; empty if it can."""
        return ""

    def check(self, model: nn.Module, shape: tuple[int, int, int], options: Chosen) -> None:
        """Raise `UserError` for what can be said of a model, on images of `shape`, without any work."""

    def saves(self, model: nn.Module, shape: tuple[int, int, int], options: Chosen) -> tuple[int, int]:
        """The least and the most multiply-accumulates an image that it will save, as far as that is known without any work and is
        no matter of its own budget."""
        return 0, 0

    def budget(self, options: Chosen) -> tuple[float, float] | None:
        """Share of the model's MACs that cutting its MLPs must reach, and the share of theirs that stays even so (0: none), where
        they can be held against the model before any work; None where nothing of the kind is asked."""
        return None

    def within(self, options: Chosen, target: float, model: nn.Module, shape: tuple[int, int, int]) -> Chosen:
        """Options with which the result costs the share `target` of the dense MACs. `model` is what the method starts from, on
        images of `shape`. Raises `OutOfReach` if it cannot."""
        return options.model_copy(update={"target_macs": target})
