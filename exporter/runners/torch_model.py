"""A PyTorch module as a runner."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import nn

from exporter.runners.base import Runner


class TorchRunner(Runner):
    """`model` in eval mode on the CPU; its one output comes back in the type that the model gives."""

    def __init__(self, model: nn.Module):
        self.model = model.eval()

    @property
    def name(self) -> str:
        return f"torch {torch.__version__} CPU"

    @property
    def outputs(self) -> list[str]:
        return ["output"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    @torch.inference_mode()
    def run(self, images: np.ndarray) -> list[np.ndarray]:
        return [self.model(torch.from_numpy(images)).numpy()]
