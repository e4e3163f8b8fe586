"""An interrupted fine-tuning: who may go on from it, its state on disk and on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moee.config import FinetuneConfig
from moee.data.image_set import ImageSet
from moee.errors import UserError
from moee.parallel.group import Group, Parcel
from moee.places.resume import OUTDATED, difference, fingerprint, outdated
from moee.progress import Reporter, silent
from moee.store.artifact import sha256_file, write_json
from moee.store.cache import tensor_hash
from moee.store.tensor_file import write_tensors
from moee.train.result import FinetuneResult
from moee.train.state import SCHEMA, read_state, read_tensors, stored_tensors

STATE, TENSORS = "state.json", "state-{epoch}.safetensors"


@dataclass(frozen=True)
class Learner:
    """What the steps change: the trained parameters by name, their optimiser, the scaler of their gradients."""

    trainable: dict[str, nn.Parameter]
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def weights(self) -> dict[str, Tensor]:
        """A copy of the parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.trainable.items()}

    def step(self) -> dict[str, float]:
        return {"step": float(next(iter(self.optimiser.state.values()))["step"])}

    def tensors(self, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters, the `best` ones so far, and the optimiser's averages, by names that tell them apart."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trainable.items():
            slots = self.optimiser.state[parameter]
            tensors |= {f"model.{name}": parameter.detach(), f"best.{name}": best[name]}
            tensors |= {f"{key}.{name}": slots[key] for key in ("exp_avg", "exp_avg_sq") if key in slots}
        return tensors

    def put(self, tensors: Mapping[str, Tensor], step: float) -> dict[str, Tensor]:
        """Set parameters and the optimiser's averages to what `tensors` gave; returns the best weights so far."""
        best = {}
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[f"model.{name}"])
                best[name] = tensors[f"best.{name}"].to(parameter.device)
                if f"exp_avg.{name}" not in tensors:  # it never had a gradient
                    continue
                averages = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
                self.optimiser.state[parameter] = {"step": torch.tensor(step), **averages}
        return best


@dataclass(frozen=True)
class Standing:
    """How far a run has come: epochs done, the best weights so far, the losses."""

    epochs: int
    best: dict[str, Tensor]
    result: FinetuneResult


def identity_of(
    model: nn.Module, dense: nn.Module, data: ImageSet, config: FinetuneConfig, folder: Path, *, report: Reporter = silent
) -> dict[str, Any]:  # fmt: skip
    """What a resumed run must share with the one that was interrupted: the teacher too, which may have been drawn at random.
    Raises `UserError` if `folder` holds another run; of two that differ in other things too, the images are not read."""
    identity = {
        "config": config.model_dump(), "images": len(data), "weights": _hash(model), "teacher": _hash(dense),
    }  # fmt: skip
    state = read_state(folder / STATE) if (folder / STATE).is_file() else None
    if state is not None:
        stored_tensors(folder, state)
        _refuse_another(folder, {name: state["identity"].get(name) for name in identity}, identity)
    identity["content"] = fingerprint(data, report, "training images")
    if state is not None:
        _refuse_another(folder, state["identity"], identity)
    return identity


def _refuse_another(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differing = difference(before, now)
    if differing is None:
        return
    name, stored, ours = differing
    if outdated(stored, ours):
        raise UserError(f"{folder} holds an interrupted run of an earlier version, {OUTDATED}; remove the folder")
    raise UserError(
        f"{folder} holds an interrupted run with another {name} ({stored!r}, now {ours!r}); finish that run or remove the folder"
    )


def _hash(model: nn.Module) -> str:
    """Of all tensors by name: a sum would take rows that changed places, such as two classes of a head, for the same model."""
    state = model.state_dict()
    return tensor_hash(*state.values(), extra=" ".join(state))[:16]


def share_standing(standing: Standing | None, learner: Learner, group: Group) -> Standing | None:
    """What rank 0 restored, on every rank: the `learner` too."""
    if group.alone:
        return standing
    parcel = None
    if group.leader and standing is None:
        parcel = Parcel(None)
    elif group.leader and standing is not None:
        body = {"epoch": standing.epochs, "result": asdict(standing.result), **learner.step()}
        body["scaler"] = learner.scaler.state_dict()
        parcel = Parcel(body, learner.tensors(standing.best))
    told, tensors = group.broadcast(parcel)
    if told is None or standing is not None:
        return standing
    learner.scaler.load_state_dict(told["scaler"])
    return Standing(told["epoch"], learner.put(dict(tensors), told["step"]), FinetuneResult(**told["result"]))


def store_standing(folder: Path, identity: dict[str, Any], learner: Learner, standing: Standing) -> None:
    """Write the tensors first and the pointer to them last, so that a kill in between leaves the former state."""
    folder.mkdir(parents=True, exist_ok=True)
    result = standing.result
    path = folder / TENSORS.format(epoch=standing.epochs)
    write_tensors(learner.tensors(standing.best), path)
    losses = {"train_loss": result.train_loss[1:], "validation_loss": result.validation_loss}
    write_json(
        folder / STATE,
        {"schema": SCHEMA, "epoch": standing.epochs, "identity": identity, "file": path.name,
         "sha256": sha256_file(path), **learner.step(), "scaler": learner.scaler.state_dict(),
         **losses, "best_epoch": result.best_epoch, "lr": result.lr},
    )  # fmt: skip
    for old in folder.glob(TENSORS.format(epoch="*")):
        if old != path:
            old.unlink()


def restore_standing(folder: Path, identity: dict[str, Any], learner: Learner) -> Standing | None:
    """How far the run in `folder` came, with the `learner` set to what it was. None where `folder` holds no state.

    Raises `UserError` for the state of another run, or a damaged one."""
    if not (folder / STATE).is_file():
        return None
    state = read_state(folder / STATE)
    _refuse_another(folder, state["identity"], identity)
    best = learner.put(read_tensors(folder, state, learner.trainable), state["step"])
    learner.scaler.load_state_dict(state.get("scaler", {}))
    losses = [math.nan, *state["train_loss"]], state["validation_loss"]
    result = FinetuneResult(*losses, state["best_epoch"], lr=state["lr"])
    return Standing(int(state["epoch"]), best, result)
