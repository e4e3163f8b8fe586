"""Ctrl-C that arrives where Python cannot raise it, and SIGTERM, which is one more word for it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

ARRIVED = threading.Event()  # an interrupt came: whatever ends the command then, it is that
AGAIN_S = 0.05  # later: the hook itself must have ended


def lose_none() -> None:
    """Let an interrupt that Python reports and drops, since it arrived in a destructor or a callback, arrive again. Note that
    one came: libraries make errors of their own of it, such as safetensors' of a file that is none. SIGTERM, which `timeout`,
    containers and schedulers send, is an interrupt too: what lies on disk for the run alone goes with it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or somebody's
        signal.signal(signal.SIGINT, _note)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        owner = os.getpid()
        signal.signal(signal.SIGTERM, lambda number, frame: _terminate(number, frame, owner))
    before = sys.unraisablehook

    def see(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            again = threading.Timer(AGAIN_S, signal.raise_signal, (signal.SIGINT,))
            again.daemon = True
            again.start()
        else:
            before(lost)

    sys.unraisablehook = see


def _terminate(number: int, frame: Any, owner: int) -> None:
    """Interrupt the process `owner`; a copy of it, such as a worker that a pool ends, ends as it would have."""
    if os.getpid() != owner:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _note(number, frame)


def _note(number: int, frame: Any) -> None:
    ARRIVED.set()
    signal.default_int_handler(number, frame)
