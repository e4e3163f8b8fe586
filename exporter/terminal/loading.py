"""Importing what a command works with, which takes seconds, or half a minute on a busy machine."""

from __future__ import annotations

import importlib
import sys
import threading
from contextlib import suppress

PATIENCE_S = 2.0
SAID = "loading libraries (PyTorch, timm and others)"


def load(module: str) -> None:
    """Import a module; a line on standard error says so if that takes longer than `PATIENCE_S`."""
    notice = threading.Timer(PATIENCE_S, print, (SAID,), {"file": sys.stderr, "flush": True})
    notice.daemon = True
    with suppress(RuntimeError):  # no more threads can be started
        notice.start()
    try:
        importlib.import_module(module)
    finally:
        notice.cancel()
