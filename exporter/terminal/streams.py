"""The standard streams of a process: there, and able to show any text."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys

NAMES = ("stdin", "stdout", "stderr")
# what stands for a character that the terminal's encoding lacks; any other is shown as Python writes it
PLAIN = {"–": "-", "—": "-", "…": "...", "×": "x", "±": "+-", "µ": "u", "≤": "<=", "≥": ">=", "→": "->"}  # noqa: RUF001
REPLACING = "moee.plain"


def make_usable() -> None:
    """Open what is closed, and let no character end a command. Call it once, before a file is opened.

    A file that is opened later would get the number of a closed stream, and what a library prints would be written into it.
    """
    codecs.register_error(REPLACING, _plain)
    for number, name in enumerate(NAMES):
        if getattr(sys, name) is None:
            setattr(sys, name, _open_nothing(number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=REPLACING)


def flush() -> None:
    """Show what is left. Raises `BrokenPipeError` where the reader of a pipe is gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # closed since
            stream.flush()


def drop_output() -> None:
    """Show nothing more, since nobody reads: Python would complain again when it flushes at its end."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def _open_nothing(number: int) -> io.TextIOWrapper:
    """A stream without content, under the number that it should have where that is free."""
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        os.set_inheritable(number, True)
        return open(number, "w" if number else "r", encoding="utf-8", closefd=False)
    return open(os.devnull, "w" if number else "r", encoding="utf-8")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: the text in the place of what cannot be encoded, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or ascii(c)[1:-1] for c in text), error.end
