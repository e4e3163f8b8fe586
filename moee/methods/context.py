"""What every method works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from moee.calibrate.calibration import LayerTokens
from moee.data.image_set import ImageSet
from moee.parallel.group import SOLO, Group
from moee.progress import Reporter, silent
from moee.space.limits import USUAL, Limits


@dataclass(frozen=True)
class Context:
    """What a method works with: the calibration images, where it reports progress, the ranks that share the work (and their
    devices), how many layers are clustered side by side, tokens that an earlier calibration of the same model collected, where
    calibration tokens lie (a temporary folder of their own by default), what a method leaves for its next call on the same dense
    model and data, the `dense` model, whose outputs are wanted (None: what the method is given), and how large the pieces of
    work may be."""

    data: ImageSet
    report: Reporter = silent
    group: Group = SOLO
    jobs: int = 1
    sampled: Sequence[LayerTokens] | None = None
    scratch: Path | None = None
    left: dict[Any, Any] = field(default_factory=dict)
    dense: nn.Module | None = None
    limits: Limits = USUAL
