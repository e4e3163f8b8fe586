"""The learning rate of a model that nobody gave one for, found by a trial.

AdamW moves every weight by about the learning rate a step, whatever the gradients are worth. A model that a refit has brought
near its teacher is thrown out by a rate that a model far from it needs. So a few steps are taken at a rate too small to matter;
what they add up to is then scaled as each larger rate would, and held against images that are not trained on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moee.config import FinetuneConfig
from moee.data.image_set import ImageSet
from moee.train.rate import make_optimiser
from moee.train.step import Trainer

PAPER_RATE = 1.5e-5  # of a model that is far from its teacher, as extraction without compensation leaves it
RELATIVE_RATE = 1e-3  # the same as a share of each tensor's root mean square
HALVINGS = 8  # of these that are tried
STEPS, IMAGES = 3, 64  # of the trial, and on which it is judged
FORWARDS = 3 * STEPS * 32 + (HALVINGS + 2) * IMAGES  # runs of the model on an image that it takes, at the usual batch
WORSE = 1.5  # times the loss at the start, beyond which larger rates are not tried


def largest(config: FinetuneConfig) -> float:
    """The largest rate that is tried."""
    return RELATIVE_RATE if config.relative_lr else PAPER_RATE


def tried_rate(
    trainer: Trainer, trainable: dict[str, nn.Parameter], data: ImageSet, train: Tensor, held_out: Tensor
) -> tuple[float, float]:
    """The rate, to two digits, after which a few steps on images `train` leave the least loss on some of `held_out`, and that
    loss as a share of the one before. The smallest, where none lowers it. The model is left as it came; all ranks of a group
    come to the same rate."""
    config = trainer.config
    judged = held_out[torch.linspace(0, len(held_out) - 1, min(IMAGES, len(held_out))).round().long()]
    generator = torch.Generator().manual_seed(config.seed * 100_003)
    order = train[torch.randperm(len(train), generator=generator)][: STEPS * config.batch_size]
    start = {name: p.detach().clone() for name, p in trainable.items()}
    scaler, smallest = trainer.scaler.state_dict(), largest(config) / 2**HALVINGS
    optimiser = make_optimiser(trainable.values(), config)
    for slot in optimiser.param_groups:
        slot["lr"] = slot["initial_lr"] * smallest
    for images, parts in trainer.steps(data, order):
        optimiser.zero_grad(set_to_none=True)
        if not math.isfinite(trainer.backward(images, parts)):
            break
        if config.clip_norm:
            trainer.scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(trainable.values(), config.clip_norm)
        trainer.scaler.step(optimiser)
        trainer.scaler.update()
    optimiser.zero_grad(set_to_none=True)
    moved = {name: p.detach() - start[name] for name, p in trainable.items()}

    def put(factor: float) -> None:
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(start[name] + factor * moved[name] if factor else start[name])

    put(0.0)
    before = trainer.measure(data, judged)
    best, least = smallest, math.inf
    for power in range(HALVINGS + 1):
        put(2.0**power)
        loss = trainer.measure(data, judged)
        if loss < least:
            best, least = smallest * 2**power, loss
        if not loss < WORSE * before:
            break
    put(0.0)
    trainer.scaler.load_state_dict(scaler)
    return float(f"{best:.2g}"), least / before if before > 0 else 1.0
