"""Processes that compile kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


class FreshProcesses(ProcessPoolExecutor):
    """Fresh processes, as LLVM's and torch's threads do not survive a fork. They do not import the caller's main module, as
    Python's own would: a user's script without `if __name__ == "__main__"` would be run once more in each of them."""

    def __init__(self, workers: int):
        super().__init__(workers, mp_context=get_context("spawn"))

    def submit(self, call: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """As that of `ProcessPoolExecutor`; `call` is a function of an importable module. Processes are started in here."""
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            return super().submit(call, *args, **kwargs)
        finally:
            sys.modules["__main__"] = main
