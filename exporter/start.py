"""The program `moee`: an interrupt while its parts are read ends it in one sentence, as a later one does."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

INTERRUPTED = 130  # exit code


def main() -> int:
    """Run the words of this process as a command line; returns the exit code."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else a script started it in the background, where Ctrl-C is not meant
        signal.signal(signal.SIGINT, _end)
    from exporter.cli import main as moee

    signal.signal(signal.SIGINT, before)
    return moee()


def _end(number: int, frame: object) -> NoReturn:
    os.write(2, b"moee: interrupted; nothing was begun\n")
    os._exit(INTERRUPTED)
