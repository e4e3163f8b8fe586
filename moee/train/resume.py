"""An interrupted fine-tuning: who may go on from it, its state on disk and on every rank."""

from __future__ import annotations

import math
from dataclasses import asdict
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
from moee.store.tensor_file import write_tensors
from moee.train.result import FinetuneResult
from moee.train.state import SCHEMA, read_state, read_tensors, stored_tensors

STATE, TENSORS = "state.json", "state-{epoch}.safetensors"


def identity_of(
    model: nn.Module, dense: nn.Module, data: ImageSet, config: FinetuneConfig, folder: Path, report: Reporter = silent
) -> dict[str, Any]:  # fmt: skip
    """What a resumed run must share with the one that was interrupted: the teacher too, which may have been drawn at random.
    Raises `UserError` if `folder` holds another run; of two that differ in other things too, the images are not read."""
    identity = {
        "config": config.model_dump(), "images": len(data), "weights": _checksum(model), "teacher": _checksum(dense),
    }  # fmt: skip
    state = read_state(folder / STATE) if (folder / STATE).is_file() else None
    if state is not None:
        stored_tensors(folder, state)
        _refuse_another(folder, {name: state["identity"].get(name) for name in identity}, identity)
    identity["content"] = fingerprint(data, report)
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
        f"{folder} holds an interrupted run with another {name} ({stored!r}, now {ours!r}); finish that one or remove the folder"
    )


def _checksum(model: nn.Module) -> str:
    return f"{sum(float(p.detach().double().abs().sum()) for p in model.parameters()):.6f}"


def share_state(
    restored: tuple[int, dict[str, Tensor], FinetuneResult] | None, trainable: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler, group: Group,
) -> tuple[int, dict[str, Tensor], FinetuneResult] | None:  # fmt: skip
    """What rank 0 restored, on every rank: `trainable` and `optimiser` too."""
    if group.alone:
        return restored
    parcel = None
    if group.leader and restored is None:
        parcel = Parcel(None)
    elif group.leader and restored is not None:
        epoch, best, result = restored
        tensors = _state_tensors(trainable, best, optimiser)
        parcel = Parcel({"epoch": epoch, "result": asdict(result), "scaler": scaler.state_dict(), **_step(optimiser)}, tensors)
    body, theirs = group.broadcast(parcel)
    if body is None or restored is not None:
        return restored
    scaler.load_state_dict(body["scaler"])
    best = _put_state(dict(theirs), body["step"], trainable, optimiser)
    return body["epoch"], best, FinetuneResult(**body["result"])


def _step(optimiser: torch.optim.Optimizer) -> dict[str, float]:
    return {"step": float(next(iter(optimiser.state.values()))["step"])}


def _state_tensors(trainable, best, optimiser) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable.items():
        slots = optimiser.state[parameter]
        tensors |= {f"model.{name}": parameter.detach(), f"best.{name}": best[name]}
        tensors |= {f"{key}.{name}": slots[key] for key in ("exp_avg", "exp_avg_sq") if key in slots}
    return tensors


def _put_state(tensors: dict[str, Tensor], step: float, trainable, optimiser) -> dict[str, Tensor]:
    """Set parameters and the optimiser's averages; returns the best weights so far."""
    best = {}
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(tensors[f"model.{name}"])
            best[name] = tensors[f"best.{name}"].to(parameter.device)
            if f"exp_avg.{name}" not in tensors:  # it never had a gradient
                continue
            averages = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            optimiser.state[parameter] = {"step": torch.tensor(step), **averages}
    return best


def store_state(
    folder: Path, epoch: int, identity: dict, trainable, best, optimiser, result: FinetuneResult, scaler: torch.amp.GradScaler
) -> None:
    """Write the tensors first and the pointer to them last, so that a kill in between leaves the former state."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _state_tensors(trainable, best, optimiser)
    path = folder / TENSORS.format(epoch=epoch)
    write_tensors(tensors, path)
    losses = {"train_loss": result.train_loss[1:], "validation_loss": result.validation_loss, "best_epoch": result.best_epoch}
    write_json(
        folder / STATE,
        {"schema": SCHEMA, "epoch": epoch, "identity": identity, "file": path.name,
         "sha256": sha256_file(path), **_step(optimiser), "scaler": scaler.state_dict(), **losses},
    )  # fmt: skip
    for old in folder.glob(TENSORS.format(epoch="*")):
        if old != path:
            old.unlink()


def restore_state(
    folder: Path, identity: dict, trainable, optimiser, scaler: torch.amp.GradScaler
) -> tuple[int, dict[str, Tensor], FinetuneResult] | None:
    """The epochs done, the best weights so far and the losses, with `trainable`, `optimiser` and `scaler` set to what they were.
    None where `folder` holds no state; raises `UserError` for one of another run, or damaged."""
    if not (folder / STATE).is_file():
        return None
    state = read_state(folder / STATE)
    _refuse_another(folder, state["identity"], identity)
    best = _put_state(read_tensors(folder, state, trainable), state["step"], trainable, optimiser)
    scaler.load_state_dict(state.get("scaler", {}))
    result = FinetuneResult([math.nan, *state["train_loss"]], state["validation_loss"], state["best_epoch"])
    return int(state["epoch"]), best, result
