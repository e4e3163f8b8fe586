"""The state of an interrupted fine-tuning as it lies on disk, checked before anything is restored from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from moee.errors import UserError
from moee.schema import Body, checked, upgraded
from moee.store.artifact import read_json, sha256_file
from moee.weights.weights_file import read_safetensors

SCHEMA = "moee.finetune/3"


class State(Body):
    """The body of `state.json`; losses by epoch, the first validation loss is from before training."""

    epoch: int = Field(ge=1)
    identity: dict[str, Any]
    file: str
    sha256: str
    step: float = Field(ge=0)
    train_loss: list[float]
    validation_loss: list[float] = Field(min_length=1)
    best_epoch: int = Field(ge=0)
    lr: float = Field(gt=0)


def read_state(path: Path) -> dict[str, Any]:
    """`state.json`. Raises `UserError` for one that is damaged, foreign or in disagreement with itself."""
    body = upgraded(read_json(path), SCHEMA, path)
    state = checked(State, body, path)
    if len(state.train_loss) != state.epoch or len(state.validation_loss) != state.epoch + 1 or state.best_epoch > state.epoch:
        raise UserError(f"{path} does not agree with itself on its {state.epoch} epochs; remove {path.parent} to start again")
    return body


def stored_tensors(folder: Path, state: Mapping[str, Any]) -> Path:
    """The file of tensors that `state` names. Raises `UserError` if it is missing or changed."""
    path = folder / Path(state["file"]).name
    if not path.is_file() or sha256_file(path) != state["sha256"]:
        raise UserError(f"{path} is missing or changed; remove {folder} to start the fine-tuning again")
    return path


def read_tensors(folder: Path, state: Mapping[str, Any], trainable: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `state` names: weights, best weights and the optimiser's of every trainable parameter, in its shape.

    Raises `UserError` if the file is missing or changed, or a tensor is not there or another's.
    """
    path = stored_tensors(folder, state)
    tensors = read_safetensors(path)
    for name, parameter in trainable.items():
        slots = ("exp_avg", "exp_avg_sq") if f"exp_avg.{name}" in tensors else ()  # a parameter without gradients has none
        for part in ("model", "best", *slots):
            tensor = tensors.get(f"{part}.{name}")
            if tensor is None or tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
                raise UserError(f"{path} holds no fitting {part}.{name}; remove {folder} to start the fine-tuning again")
    return tensors
