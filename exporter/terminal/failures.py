"""Exceptions to exit codes and one sentence each: what the command line shows instead of a traceback."""

from __future__ import annotations

import errno
import os
import re
import sys

from exporter.terminal.flags import BAD_INPUT, ENVIRONMENT, GATE_FAILED, INTERRUPTED
from moee.cures import cures
from moee.errors import BudgetUnmet, MissingDependency, StepFailed, UserError, plain

# what the machine lacks, as opposed to a path that was given wrongly
LACKS = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or choose another disk",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "free some memory",
    errno.EAGAIN: "raise the limit on processes and threads (ulimit -u), or use fewer processes and threads",
    errno.EIO: "check the disk",
}
PATH_CURES = {
    errno.ENOENT: "it was removed or never there; make it again",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change its permissions or choose another",
    errno.EPERM: "change its permissions or choose another",
}
NO_THREAD = ("can't start new thread", os.strerror(errno.EAGAIN))  # Python's words, and those of C++ libraries
MAX_SENTENCE = 2000  # characters
GPU_CURES = ("use --torch-device cpu", "use a smaller --batch-size", "close what else uses the GPU")
INTACT = "earlier results are as they were"


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and sentence of an exception that ended a command."""
    code, text = _explain(error)
    return code, one_line("; ".join([text, *getattr(error, "__notes__", ())]))


def one_line(text: str) -> str:
    """A sentence that may quote a file from someone else: what would control the terminal is not passed on."""
    sentence = plain(re.sub(r"[ \t\n\r\f\v]+", " ", text).strip())
    return sentence if len(sentence) <= MAX_SENTENCE else f"{sentence[:MAX_SENTENCE]}..."


def _explain(error: BaseException) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted; {INTACT}"
    if isinstance(error, BudgetUnmet):
        return GATE_FAILED, str(error)
    if isinstance(error, UserError):
        return _code_of_cause(error), str(error)
    if isinstance(error, MissingDependency):
        return ENVIRONMENT, str(error)
    if isinstance(error, StepFailed):
        return GATE_FAILED, " ".join(str(error).split())
    if isinstance(error, torch_memory_error()):
        return ENVIRONMENT, f"the GPU is out of memory; {cures(*GPU_CURES)}; {INTACT}"
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return ENVIRONMENT, f"out of memory; free some, or use fewer tokens or a smaller batch; {INTACT}"
    if isinstance(error, OSError):
        return _explain_os_error(error)
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_THREAD):
        return ENVIRONMENT, f"no more threads can be started; {LACKS[errno.EAGAIN]}; {INTACT}"
    if isinstance(error, RuntimeError) and "cpuinfo" in str(error):
        return ENVIRONMENT, f"PyTorch cannot tell the processor, for which it reads /proc/cpuinfo; mount /proc; {INTACT}"
    text = (str(error).strip().splitlines() or ["no message"])[0]
    return GATE_FAILED, (
        f"unexpected {type(error).__name__}: {text}; {INTACT}. Run `moee --debug` with the same arguments for the "
        "traceback, and please report it"
    )


def _explain_os_error(error: OSError) -> tuple[int, str]:
    number = _errno_of(error)
    place = error.filename2 if number in LACKS and error.filename2 else error.filename  # a copy lacks space where it goes
    what = f"{place}: " if place is not None else ""
    if number is None:  # NumPy's short writes carry text alone
        return ENVIRONMENT, f"{what}{' '.join(str(error).split())}; is the disk full? {INTACT}"
    cure = LACKS.get(number) or PATH_CURES.get(number, "check that path")
    return (ENVIRONMENT if number in LACKS else BAD_INPUT), f"{what}{os.strerror(number)}; {cure}; {INTACT}"


def _errno_of(error: OSError) -> int | None:
    """Its number; libraries that wrap the system's error leave it in the text alone."""
    if error.errno is not None:
        return error.errno
    code = re.search(r"\[?[Ee]rrno (\d+)\]?|os error (\d+)", str(error))
    return int(code[1] or code[2]) if code else None


def _code_of_cause(error: UserError) -> int:
    """A full disk stays the machine's fault when a sentence was made of it."""
    cause = error.__cause__
    return ENVIRONMENT if isinstance(cause, OSError) and cause.errno in LACKS else BAD_INPUT


def torch_memory_error() -> tuple[type[BaseException], ...]:
    """What torch raises when a GPU's memory is full; nothing where torch was not imported, and so raised nothing."""
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.OutOfMemoryError,)


def _out_of_memory(error: BaseException) -> bool:
    """torch reports a failed allocation as a RuntimeError."""
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
