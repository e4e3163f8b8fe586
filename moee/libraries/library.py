"""What the project asks of a library of models: one row of functions each, looked up by `ModelSpec.library`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from moee.interface.spec import ModelSpec


@dataclass(frozen=True)
class Named:
    """A model as its name says it: without weights yet, the file of weights that the name brings, and sentences for the user."""

    spec: ModelSpec
    weights: Path | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Library:
    """How models of one library are made.

    - `check(spec)` raises `UserError` for a name or arguments that must not, or cannot, be used; nothing is built.
    - `create(spec)` gives the model in eval mode, float32, with weights of no meaning, on the current default device: for its
      shapes, or to be filled. What the model itself refuses may raise anything.
    - `pretrained(spec)` gives it with the weights that the library, or the function, brings.
    - `size_argument(spec)`: the argument by which the model is told the size of its images, None where there is none.
    - `takes_classes(spec)`: whether the argument `num_classes` decides how many classes the model tells apart.
    - `pretrained_classes(spec)`: how many classes those weights tell apart, None where nobody knows.
    - `drifted(spec)`: the sentence for weights that are not those of the artifact.
    """

    check: Callable[[ModelSpec], None]
    create: Callable[[ModelSpec], nn.Module]
    pretrained: Callable[[ModelSpec], nn.Module]
    size_argument: Callable[[ModelSpec], str | None]
    takes_classes: Callable[[ModelSpec], bool]
    pretrained_classes: Callable[[ModelSpec], int | None]
    drifted: Callable[[ModelSpec], str]
