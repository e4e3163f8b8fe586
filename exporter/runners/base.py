"""What every runner offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np


class Runner(ABC):
    """Executes one model. Enter it, then call `run` as often as needed; leaving frees what it holds.

    `__enter__` raises `MissingDependency` if the runtime, provider, plugin or device that it was asked for is absent: a runner
    never falls back to another one.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Runtime, version and device, as results record it."""

    @property
    @abstractmethod
    def outputs(self) -> list[str]:
        """Names of the arrays that `run` returns, in order."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    @abstractmethod
    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """images [B, C, H, W] float32 to the model's outputs; returns when they are complete, in host memory."""

    def bound(self, images: np.ndarray) -> Callable[[], Any]:
        """One inference on `images` [B, C, H, W] as a call that returns when it is complete, for timing: what can be done before
        the call is done here."""
        return lambda: self.run(images)


class GraphRunner(Runner):
    """Executes an ONNX graph. `exporter.runners.registry` lists the runtimes that have one."""

    @abstractmethod
    def run_feeds(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Run a graph of any inputs, given by name. Raises `UserError` if the runtime fails at it."""
