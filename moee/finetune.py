"""Distillation: the MoEE model learns from the unmodified one (paper, section 4; its recipe as defaults).

A classifier matches the teacher's logits (KL divergence), a backbone its features (squared error relative to their power,
plus one minus cosine); `distil` tokens adds every token of the last feature map. Teacher outputs are computed once, since
images are not augmented. The router stays frozen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from moee.artifact import sha256_file, write_json
from moee.config import FinetuneConfig
from moee.data import Batch, ImageSet, batches
from moee.errors import UserError
from moee.evaluate import run
from moee.finetune_state import SCHEMA, read_state, read_tensors
from moee.layer import routed_layers
from moee.models import channels_last
from moee.progress import Reporter, silent
from moee.resume import difference, fingerprint
from moee.tensor_file import write_tensors

STATE, TENSORS = "state.json", "state-{epoch}.safetensors"


@dataclass
class FinetuneResult:
    """Losses by epoch (index 0 is before training) and the epoch whose weights were kept."""

    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    best_epoch: int = 0


def distillation_loss(student: Tensor, teacher: Tensor, classifier: bool, temperature: float = 1.0) -> Tensor:
    """Scalar loss of outputs [B, C]: KL(teacher || student) for logits, relative error plus 1 - cosine for features."""
    if classifier:
        log_student = torch.log_softmax(student / temperature, -1)
        soft = torch.softmax(teacher / temperature, -1)
        return nn.functional.kl_div(log_student, soft, reduction="batchmean") * temperature**2
    relative = (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)
    return (relative + 1 - nn.functional.cosine_similarity(student, teacher, dim=-1)).mean()


def token_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Scalar loss of feature maps [B, ..., D]: squared error over the teacher's mean power, plus one minus the tokens' cosine."""
    relative = (student - teacher).square().sum(-1).mean() / teacher.square().sum(-1).mean().clamp(min=1e-12)
    return relative + 1 - nn.functional.cosine_similarity(student, teacher, dim=-1).mean()


def rate(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate: a linear rise over the share `warmup` of the steps, then half a cosine down to zero."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise))) / 2


class _Comparison:
    """Loss of a batch: on the output, and with `distil` tokens on the last feature map too (the dense model runs along)."""

    def __init__(self, model: nn.Module, dense: nn.Module, teacher: Tensor, classifier: bool, config: FinetuneConfig):
        self.model, self.dense, self.teacher, self.classifier, self.config = model, dense, teacher, classifier, config

    def __call__(self, batch: Batch) -> Tensor:
        target = self.teacher[batch.indices]
        if self.config.distil == "output":
            return distillation_loss(self.model(batch.images), target, self.classifier, self.config.temperature)
        features = self.model.forward_features(batch.images)  # type: ignore[operator]
        output = self.model.forward_head(features)  # type: ignore[operator]
        with torch.no_grad():
            wanted = self.dense.forward_features(batch.images)  # type: ignore[operator]
        tokens = token_loss(channels_last(features, self.model), channels_last(wanted, self.dense))
        return distillation_loss(output, target, self.classifier, self.config.temperature) + tokens


def finetune(
    model: nn.Module, dense: nn.Module, data: ImageSet, config: FinetuneConfig, report: Reporter = silent,
    resume: Path | None = None, teacher: Tensor | None = None,
) -> FinetuneResult:  # fmt: skip
    """Train `model` in place to match `dense` on `data`; leaves the weights of the best validation epoch in it.

    With `resume`, a folder, the state is saved after every epoch and an interrupted run goes on from it; a run with
    another configuration or model is refused with `UserError`. `teacher` [N, C]: the dense model's outputs on `data`, if they
    are there already.
    """
    if len(data) < 2:
        raise UserError(f"fine-tuning needs at least 2 images, came {len(data)}")
    classifier = bool(getattr(model, "num_classes", 0))
    teacher = (run(dense, data, report, "teacher").features if teacher is None else teacher).clone()
    if data.skipped:
        raise UserError(f"fine-tuning needs readable images; {len(data.skipped)} of {len(data)} are not, remove them first")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))
    held_out = order[: max(1, round(len(data) * config.validation))].sort().values
    train = order[len(held_out) :].sort().values
    for layer in routed_layers(model).values():
        layer.router.requires_grad_(config.train_router)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trainable.values(), lr=config.lr, weight_decay=config.weight_decay)
    steps = -(-len(train) // config.batch_size)
    compare = _Comparison(model, dense, teacher, classifier, config)

    def validate() -> float:
        total = 0.0
        with torch.no_grad():
            for batch in batches(data, config.batch_size, order=held_out):
                total += float(compare(batch)) * len(batch.images)
        return total / len(held_out)

    # the modules stay in eval mode: timm's dropout and stochastic depth would act on the student alone
    result = FinetuneResult()
    identity = _identity(model, data, config)
    first, best = 0, {name: p.detach().clone() for name, p in trainable.items()}
    restored = _restore(resume, identity, trainable, optimiser) if resume is not None else None
    if restored is not None:
        first, best, result = restored
    else:
        result.validation_loss.append(validate())
        result.train_loss.append(math.nan)
    report("finetune", first * steps, config.epochs * steps)
    for epoch in range(first, config.epochs):
        generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch + 1)
        total = 0.0
        shuffled = train[torch.randperm(len(train), generator=generator)]
        for step, batch in enumerate(batches(data, config.batch_size, order=shuffled), 1):
            for group in optimiser.param_groups:
                group["lr"] = config.lr * rate(epoch * steps + step - 1, config.epochs * steps, config.warmup)
            loss = compare(batch)
            if not torch.isfinite(loss):
                raise UserError(f"the loss became {float(loss)} in epoch {epoch + 1}; lower --lr (came {config.lr})")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(batch.images)
            report("finetune", epoch * steps + step, config.epochs * steps)
        result.train_loss.append(total / len(train))
        result.validation_loss.append(validate())
        if result.validation_loss[-1] < min(result.validation_loss[:-1]):
            result.best_epoch = epoch + 1
            best = {name: p.detach().clone() for name, p in trainable.items()}
        if resume is not None:
            _store(resume, epoch + 1, identity, trainable, best, optimiser, result)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(best[name])
    return result


def _identity(model: nn.Module, data: ImageSet, config: FinetuneConfig) -> dict:
    """What a resumed run must share with the one that was interrupted."""
    checksum = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    shared = {"config": config.model_dump(), "data": data.name, "images": len(data), "content": fingerprint(data)}
    return {**shared, "weights": f"{checksum:.6f}"}


def _store(folder: Path, epoch: int, identity: dict, trainable, best, optimiser, result: FinetuneResult) -> None:
    """Write the tensors first and the pointer to them last, so that a kill in between leaves the former state."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable.items():
        slots = optimiser.state[parameter]
        tensors |= {f"model.{name}": parameter.detach(), f"best.{name}": best[name]}
        tensors |= {f"{key}.{name}": slots[key] for key in ("exp_avg", "exp_avg_sq") if key in slots}
    path = folder / TENSORS.format(epoch=epoch)
    write_tensors(tensors, path)
    losses = {"train_loss": result.train_loss[1:], "validation_loss": result.validation_loss, "best_epoch": result.best_epoch}
    write_json(
        folder / STATE,
        {"schema": SCHEMA, "epoch": epoch, "identity": identity, "file": path.name,
         "sha256": sha256_file(path), "step": float(next(iter(optimiser.state.values()))["step"]), **losses},
    )  # fmt: skip
    for old in folder.glob(TENSORS.format(epoch="*")):
        if old != path:
            old.unlink()


def _restore(folder: Path, identity: dict, trainable, optimiser) -> tuple[int, dict[str, Tensor], FinetuneResult] | None:
    if not (folder / STATE).is_file():
        return None
    state = read_state(folder / STATE)
    found = difference(state["identity"], identity)
    if found is not None:
        name, stored, ours = found
        raise UserError(
            f"{folder} holds an interrupted run with another {name} ({stored!r}, now {ours!r}); "
            "finish that one or remove the folder"
        )
    tensors = read_tensors(folder, state, trainable)
    best = {}
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(tensors[f"model.{name}"])
            best[name] = tensors[f"best.{name}"]
            if f"exp_avg.{name}" not in tensors:  # it never had a gradient
                continue
            optimiser.state[parameter] = {
                "step": torch.tensor(state["step"]),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
    result = FinetuneResult([math.nan, *state["train_loss"]], state["validation_loss"], state["best_epoch"])
    return int(state["epoch"]), best, result
