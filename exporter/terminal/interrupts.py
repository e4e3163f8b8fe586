"""Ctrl-C that arrives where Python cannot raise it."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

ARRIVED = threading.Event()  # an interrupt came: whatever ends the command then, it is that
AGAIN_S = 0.05  # later: the hook itself must have ended


def lose_none() -> None:
    """Let an interrupt that Python reports and drops, since it arrived in a destructor or a callback, arrive again. Note that
    one came: libraries make errors of their own of it, such as safetensors' of a file that is none."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or somebody's
        signal.signal(signal.SIGINT, _note)
    before = sys.unraisablehook

    def see(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            again = threading.Timer(AGAIN_S, signal.raise_signal, (signal.SIGINT,))
            again.daemon = True
            again.start()
        else:
            before(lost)

    sys.unraisablehook = see


def _note(number: int, frame: Any) -> None:
    ARRIVED.set()
    signal.default_int_handler(number, frame)
