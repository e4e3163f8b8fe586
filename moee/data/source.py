"""What a source of images is to the rest of the project. `moee.data.sources` lists them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from moee.data.image_set import Source
from moee.data.transform import Transform
from moee.progress import Reporter, silent


class DataSource(ABC):
    """Where images come from, by the name that `--data` gives.

    `fetched`: opening it may fetch from a network, so a name that only an artifact records is not opened.
    """

    fetched: ClassVar[bool] = False

    @abstractmethod
    def takes(self, name: str) -> bool:
        """Whether a name is of this source."""

    @abstractmethod
    def open(self, name: str, transform: Transform, splits: Sequence[str], seed: int, report: Reporter = silent) -> Source:
        """The images, at least of `splits` (train, val), each as a model with `transform` sees it. What has no splits is divided
        under `seed`. Raises `UserError` for a name that cannot be opened."""

    def path(self, name: str) -> str:
        """The folder or file of this machine that a name ends with; empty for none."""
        return ""

    def located(self, name: str) -> str:
        """The name with that folder or file by its absolute path, as far as it is there."""
        path = self.path(name)
        return name.removesuffix(path) + os.path.abspath(path) if path and os.path.exists(path) else name

    def part(self, name: str) -> str:
        """What a name takes from that folder, where one holds several sets; empty for all of it."""
        return ""
