"""What a method that cuts a model is to the rest of the project. `moee.methods.registry` lists them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

from torch import nn

from moee.calibrate.calibration import LayerTokens
from moee.config import MethodOptions
from moee.data.image_set import ImageSet
from moee.layers.report import LayerReport
from moee.parallel.group import SOLO, Group
from moee.progress import Reporter, silent

Options = TypeVar("Options", bound=MethodOptions)
Shares = Literal["tokens", "groups", "nothing"]


@dataclass(frozen=True)
class Context:
    """What a method works with: the calibration images, where it reports progress, the ranks that share the work (and their
    devices), how many layers are clustered side by side, and tokens that an earlier calibration of the same model collected."""

    data: ImageSet
    report: Reporter = silent
    group: Group = SOLO
    jobs: int = 1
    sampled: list[LayerTokens] | None = None


class Method(ABC, Generic[Options]):
    """A way to cut a model. `name` is the value of its options' field `method`. `shares`: what models of different budgets have
    in common, so that a plan makes it once: the calibration tokens, the groups of a layer's tokens, or nothing."""

    name: ClassVar[str]
    shares: ClassVar[Shares]
    options: ClassVar[type[MethodOptions]]

    @abstractmethod
    def convert(self, model: nn.Module, options: Options, context: Context) -> Sequence[LayerReport]:
        """Replace MLPs of `model` in place; one report a layer, of rank 0 alone where ranks share the work. Raises `UserError`
        for input that it cannot work with."""
