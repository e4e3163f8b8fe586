"""The learning rate of a model that nobody gave one for, found by a trial.

AdamW moves every weight by about the learning rate a step, whatever the gradients are worth. A model that a refit has brought
near its teacher is thrown out by a rate that a model far from it needs. So a few steps are taken at a tiny rate, a few at twice
that, and so on until the loss on images that are not trained on has grown: a range test (Smith, "Cyclical Learning Rates for
Training Neural Networks", 2017). Steps at small rates let AdamW's moments settle before the large ones are judged; the first
step alone goes by the signs of the gradients, for which every rate looks too large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moee.config import FinetuneConfig
from moee.data.image_set import ImageSet
from moee.progress import Reporter, silent
from moee.train.rate import make_optimiser
from moee.train.step import Trainer

PAPER_RATE = 1.5e-5  # of Adam
RELATIVE_RATE = 1e-3  # the same as a share of each tensor's root mean square
HALVINGS, DOUBLINGS = 7, 4  # of these that are tried
STEPS, BATCH, IMAGES = 2, 16, 32  # at each rate, most images of a step, and images on which the rate is judged
FORWARDS = HALVINGS * (3 * STEPS * BATCH + IMAGES) + IMAGES  # runs on an image; a refit makes larger rates worse, and they end it
WORSE = 1.2  # times the least loss, beyond which larger rates are not tried
AS_GOOD = 1.02  # times the least loss: of such rates the largest is taken, since a few steps favour small ones


def rates_of(config: FinetuneConfig) -> list[float]:
    """The rates that are tried, each twice the one before."""
    usual = RELATIVE_RATE if config.relative_lr else PAPER_RATE
    return [usual * 2.0**power for power in range(-HALVINGS, DOUBLINGS + 1)]


def tried_rate(
    trainer: Trainer, trainable: dict[str, nn.Parameter], data: ImageSet, train: Tensor, held_out: Tensor, *,
    report: Reporter = silent,
) -> tuple[float, float]:  # fmt: skip
    """A rate, to two digits, and the loss on some of `held_out` after steps at it as a share of the one before all steps: the
    largest of those after which the loss was near its least. The smallest, where none lowers it. Steps are taken on images
    `train`. The model is left as it came; all ranks of a group come to the same rate."""
    config, rates = trainer.config, rates_of(trainer.config)
    judged = held_out[torch.linspace(0, len(held_out) - 1, min(IMAGES, len(held_out))).round().long()]
    size = min(BATCH, config.batch_size)
    order = _order(train, STEPS * len(rates) * size, config.seed)
    start = {name: p.detach().clone() for name, p in trainable.items()}
    scaler, optimiser = trainer.scaler.state_dict(), make_optimiser(trainable.values(), config)
    before = trainer.measure(data, judged)
    losses: list[float] = []
    for step, (images, parts) in enumerate(trainer.steps(data, order, size)):
        report("learning rate", step, STEPS * len(rates))
        for slot in optimiser.param_groups:
            slot["lr"] = slot["initial_lr"] * rates[step // STEPS]
        optimiser.zero_grad(set_to_none=True)
        if not math.isfinite(trainer.backward(images, parts)):
            break
        if config.clip_norm:
            trainer.scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(trainable.values(), config.clip_norm)
        trainer.scaler.step(optimiser)
        trainer.scaler.update()
        if (step + 1) % STEPS == 0:
            losses.append(trainer.measure(data, judged))
            if not losses[-1] <= WORSE * min(before, *losses):
                break
    report("learning rate", STEPS * len(rates), STEPS * len(rates))
    optimiser.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(start[name])
    trainer.scaler.load_state_dict(scaler)
    chosen = _largest_as_good(losses, before)
    left = losses[chosen] / before if losses and before > 0 else 1.0
    return float(f"{rates[chosen]:.2g}"), left


def _order(train: Tensor, count: int, seed: int) -> Tensor:
    """`count` of these images, drawn anew once all were taken."""
    generator = torch.Generator().manual_seed(seed * 100_003)
    drawn = [train[torch.randperm(len(train), generator=generator)] for _ in range(-(-count // len(train)))]
    return torch.cat(drawn)[:count]


def _largest_as_good(losses: Sequence[float], before: float) -> int:
    """Where in `losses`, after steps at larger and larger rates, the rate to take stands; the first if none is below `before`."""
    least = min((loss for loss in losses if loss < before), default=None)
    if least is None:
        return 0
    near = min(max(AS_GOOD * least, least), before)  # a divergence of next to nothing may come out below zero
    return max(at for at, loss in enumerate(losses) if loss <= near)
