"""What a fine-tuning gave."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FinetuneResult:
    """Losses by epoch (index 0 is before training), the epoch whose weights were kept, what the products were computed in, and
    the learning rate."""

    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    best_epoch: int = 0
    amp: str = "off"
    lr: float = 0.0
