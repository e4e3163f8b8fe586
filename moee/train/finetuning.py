"""Distillation: the MoEE model learns from the unmodified one (paper, section 4; its recipe as defaults).

A classifier matches the teacher's logits (KL divergence), a backbone its features (squared error relative to their power,
plus one minus cosine); `distil` tokens adds every token of the last feature map. Teacher outputs are computed once; with tokens,
whose maps are too large to keep, the teacher runs beside every step. The random views of `augment` and the `collages` are the
same in every epoch. The router stays frozen.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moee.config import FinetuneConfig
from moee.cures import cures
from moee.data.collage import Collages
from moee.data.image_set import ImageSet
from moee.data.transform import model_transform
from moee.data.validation import other_images, validation_images
from moee.data.views import Joined, Views
from moee.errors import UserError
from moee.interface.adapted import can_checkpoint, has_feature_map, title_of_model
from moee.layers.routed import routed_layers
from moee.measure.evaluation import run
from moee.mlps.attention import narrow_attentions
from moee.mlps.proof import random_images
from moee.parallel.group import SOLO, Group
from moee.parallel.machine import fast_on_cpu
from moee.progress import Reporter, silent
from moee.train.rate import make_optimiser, rate
from moee.train.result import FinetuneResult
from moee.train.resume import Learner, Standing, identity_of, restore_standing, share_standing, store_standing
from moee.train.step import Trainer
from moee.train.trial import tried_rate

log = logging.getLogger("moee")


def finetune(
    model: nn.Module, dense: nn.Module, data: ImageSet, config: FinetuneConfig, report: Reporter = silent,
    *, resume: Path | None = None, teacher: Callable[[], Tensor] | None = None, group: Group = SOLO,
) -> FinetuneResult:  # fmt: skip
    """Train `model` in place to match `dense` on `data`; leaves the weights of the best validation epoch in it.

    With `resume`, a folder, the state is saved after every epoch and an interrupted run goes on from it; a run with
    another configuration or model is refused with `UserError` before anything is computed, and so is a model that cannot learn.
    `teacher`: gives the dense model's outputs on `data` [N, C], where another knows them. In a `group` the ranks share every
    batch and rank 0 keeps the state; all end with the same weights.
    """
    with group.agreed():
        if len(data) < 2:
            raise UserError(f"fine-tuning needs at least 2 images, came {len(data)}")
        if config.checkpointing and not can_checkpoint(model):
            raise UserError(f"{title_of_model(model)} has no activation checkpointing in its library; leave --checkpointing out")
        if config.distil == "tokens" and not has_feature_map(model):
            raise UserError(f"--distil tokens needs a model with one feature map; {title_of_model(model)} has none, use output")
        _refuse_idle(model, config)
    config = affordable(config, group)
    count, given = len(data), data
    held_out, train = validation_images(count, config.validation), other_images(count, config.validation)
    if not len(train):
        with group.agreed():
            raise UserError(f"--validation {config.validation:g} leaves none of {count} images to train on; give less")
    made: ImageSet | None = None
    if config.augment or config.collages:
        transform = model_transform(dense)
        views = Views(data, transform, config.augment, config.seed)
        collages = Collages(data, transform, config.collages, config.seed, train.tolist())
        # held-out images have no views in it, and collages show nothing of them
        views_of = [train + count * k for k in range(1 + config.augment)]
        train = torch.cat([*views_of, torch.arange(len(collages)) + count * (1 + config.augment)])
        data, made = Joined(data, views, collages), Joined(views, collages)
    identity: dict[str, Any] = {}
    with group.agreed():
        if group.leader:
            _refuse_unlearning(model, dense, config)
            if resume is not None:
                identity = identity_of(model, dense, data, config, resume, report=report)
    outputs = run(dense, given, report, "teacher", group=group).features if teacher is None else teacher()
    _refuse_unreadable(given, group)
    if made is not None and config.distil == "output":  # with tokens the teacher runs beside every step
        outputs = torch.cat([outputs, run(dense, made, report, "teacher on views", group=group).features])
        _refuse_unreadable(made, group)
    with group.placed(model), group.placed(dense), _chosen(model, config) as trainable:
        trainer = Trainer(model, dense, outputs, config, group)
        try:
            result = _train(trainer, trainable, data, train, held_out, identity, report, resume)
        finally:
            trainer.close()
    return replace(result, amp=config.amp)


def _refuse_idle(model: nn.Module, config: FinetuneConfig) -> None:
    """Raise `UserError` for options that would change nothing about this model."""
    layers = routed_layers(model)
    if not getattr(model, "num_classes", 0) and config.temperature != 1:
        raise UserError(f"--temperature is for logits, and {title_of_model(model)} gives features; leave it out")
    if config.train_router and not any(layer.router is not None for layer in layers.values()):
        raise UserError(f"--train-router: no layer of {title_of_model(model)} has a router; leave it out")
    if config.train == "experts" and not layers and not narrow_attentions(model):
        raise UserError(
            f"--train experts trains routed layers and narrowed attention, and {title_of_model(model)} has none; leave it out"
        )


def affordable(config: FinetuneConfig, group: Group = SOLO) -> FinetuneConfig:
    """`config` without half precision where a rank computes on a CPU that has no instructions for it; said once, by rank 0."""
    if config.amp == "off" or config.force_amp:
        return config
    if all(group.all_json(group.device.type != "cpu" or fast_on_cpu(config.amp))):
        return config
    if group.leader:
        log.warning(
            "this CPU has no %s instructions, so training in %s would be many times slower than in float32; float32 is used "
            "(--force-amp keeps %s)", config.amp, config.amp, config.amp,
        )  # fmt: skip
    return config.model_copy(update={"amp": "off"})


@contextmanager
def _chosen(model: nn.Module, config: FinetuneConfig) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters to train; the others have no gradient meanwhile."""
    layers = routed_layers(model)
    for layer in layers.values():
        if layer.router is not None:
            layer.router.requires_grad_(config.train_router)
        layer.masked = config.masked
    before = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inside = tuple(f"{name}." for name in (*layers, *narrow_attentions(model)))
    frozen = [p for name, p in before.items() if config.train == "experts" and not name.startswith(inside)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield {name: p for name, p in before.items() if p.requires_grad}
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for layer in layers.values():
            layer.masked = False


def _refuse_unlearning(model: nn.Module, dense: nn.Module, config: FinetuneConfig) -> None:
    """Raise `UserError` if no gradient reaches what is to be trained: a model may switch gradients off in its forward."""
    image = random_images(model_transform(dense).shape, next(model.parameters()))[:1]
    trial = copy.deepcopy(model)  # some models keep what they computed last, such as LeViT's and TinyViT's attention biases
    with torch.enable_grad(), _chosen(trial, config) as trainable:
        learns = bool(trainable) and trial(image).requires_grad
    if not learns:
        cure = "leave that out to fine-tune it" + ("" if config.train == "all" else ", or try --train all")
        raise UserError(
            f"nothing in {title_of_model(model)} that --train {config.train} names can learn: its forward computes without "
            f"gradients (torch.no_grad or torch.inference_mode); {cure}"
        )


def _refuse_unreadable(data: ImageSet, group: Group) -> None:
    """The teacher's outputs must stand at the images' positions, so every image has to be there."""
    with group.agreed():
        if data.skipped:
            raise UserError(f"fine-tuning needs readable images; {len(data.skipped)} of {len(data)} are not, remove them first")


def _chosen_rate(
    trainer: Trainer, trainable: dict[str, nn.Parameter], data: ImageSet, train: Tensor, held_out: Tensor, *,
    report: Reporter,
) -> float:  # fmt: skip
    chosen, share = tried_rate(trainer, trainable, data, train, held_out, report=report)
    if trainer.group.leader:
        told = "by a trial, whose steps leave" if share < 1 else "the least that is tried, though its steps leave"
        log.info("learning rate %g, %s %.3g of the validation loss%s", chosen, told, share, cures("; --lr gives another"))
    return chosen


def _train(
    trainer: Trainer, trainable: dict[str, nn.Parameter], data: ImageSet, train: Tensor, held_out: Tensor, identity: dict,
    report: Reporter, resume: Path | None,
) -> FinetuneResult:  # fmt: skip
    config, group = trainer.config, trainer.group
    optimiser = make_optimiser(trainable.values(), config)
    steps = -(-len(train) // config.batch_size)
    # the modules stay in eval mode: timm's dropout and stochastic depth would act on the student alone
    result = FinetuneResult()
    learner = Learner(trainable, optimiser, trainer.scaler)
    first, best = 0, learner.weights()
    standing = None
    with group.agreed():
        if resume is not None and group.leader:
            standing = restore_standing(resume, identity, learner)
    standing = share_standing(standing, learner, group)
    if standing is not None:
        first, best, result = standing.epochs, standing.best, standing.result
    else:
        result.validation_loss.append(trainer.measure(data, held_out))
        result.train_loss.append(math.nan)
        result.lr = (
            _chosen_rate(trainer, trainable, data, train, held_out, report=report) if config.lr is None else config.lr
        )
    chosen = 1.0 if config.lr is not None else result.lr
    report("finetune", first * steps, config.epochs * steps)
    for epoch in range(first, config.epochs):
        generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch + 1)
        total = 0.0
        shuffled = train[torch.randperm(len(train), generator=generator)]
        for step, (images, parts) in enumerate(trainer.steps(data, shuffled), 1):
            for slot in optimiser.param_groups:
                slot["lr"] = slot["initial_lr"] * chosen * rate(epoch * steps + step - 1, config.epochs * steps, config.warmup)
            optimiser.zero_grad(set_to_none=True)
            loss = trainer.backward(images, parts)
            if not math.isfinite(loss):
                with group.agreed():  # it is the same on all ranks
                    raise UserError(f"the loss became {loss} in epoch {epoch + 1}" + cures(f"; lower --lr (came {result.lr:g})"))
            if config.clip_norm:
                trainer.scaler.unscale_(optimiser)
                nn.utils.clip_grad_norm_(trainable.values(), config.clip_norm)
            trainer.scaler.step(optimiser)
            trainer.scaler.update()
            total += loss
            report("finetune", epoch * steps + step, config.epochs * steps)
        result.train_loss.append(total / len(train))
        result.validation_loss.append(trainer.measure(data, held_out))
        if result.validation_loss[-1] < min(result.validation_loss[:-1]):
            result.best_epoch = epoch + 1
            best = learner.weights()
        with group.agreed():
            if resume is not None and group.leader:
                store_standing(resume, identity, learner, Standing(epoch + 1, best, result))
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(best[name])
    return result
