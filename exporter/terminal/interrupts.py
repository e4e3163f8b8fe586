"""Ctrl-C that arrives where Python cannot raise it."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

AGAIN_S = 0.05  # later: the hook itself must have ended


def lose_none() -> None:
    """Let an interrupt that Python reports and drops, since it arrived in a destructor or a callback, arrive again."""
    before = sys.unraisablehook

    def see(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            again = threading.Timer(AGAIN_S, signal.raise_signal, (signal.SIGINT,))
            again.daemon = True
            again.start()
        else:
            before(lost)

    sys.unraisablehook = see
