"""Learning rates: their course over the steps, and those relative to a tensor's size."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from moee.config import FinetuneConfig

LEAST_RMS = 1e-3


def rate(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate: a linear rise over the share `warmup` of the steps, then half a cosine down to zero."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise))) / 2


def make_optimiser(parameters: Iterable[nn.Parameter], config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW with one group a tensor, so that `relative_lr` can give each a step of its own: lr times its root mean square, at
    least LEAST_RMS (Shazeer and Stern, "Adafactor", 2018, section 8). Without an lr the steps are those for a rate of 1."""
    groups, lr = [], 1.0 if config.lr is None else config.lr
    for parameter in parameters:
        size = max(float(parameter.detach().float().square().mean().sqrt()), LEAST_RMS) if config.relative_lr else 1.0
        groups.append({"params": [parameter], "lr": lr * size, "initial_lr": lr * size})
    return torch.optim.AdamW(groups, lr=lr, weight_decay=config.weight_decay)
