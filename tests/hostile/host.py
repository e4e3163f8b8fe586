"""A warm process that runs command lines in children with other streams, environments and folders.

    python -m tests.hostile.host < cases.json

`cases.json` is a list of objects; an answer a line comes back: exit code, what was shown, seconds. A child is as a new process
would be: its streams are opened or closed before the command line is entered as `moee` enters it.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any

LIMIT_S = 60
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18  # of <sched.h> and <sys/mount.h>
MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 0x20, 0x1000
PR_SET_KEEPCAPS, CAP_DAC_OVERRIDE, CAPABILITY_VERSION = 8, 1, 0x20080522  # of <linux/prctl.h> and <linux/capability.h>
NOBODY = 61_234  # a user who has no other process
WORK = "WORK"  # in a variable's value: the folder that the cases run in
NOT_HERE = 77  # exit code where this machine does not let a case be made


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    cases = json.load(sys.stdin)
    warm_up()
    for case in cases:
        print(json.dumps(serve(case)), file=answers, flush=True)
    answers.close()
    os._exit(0)  # what was imported takes seconds to take down


def warm_up() -> None:
    import torch

    torch.set_num_threads(1)
    import moee.artifacts.inspection
    import moee.stages.extract  # noqa: F401
    import tests.reliability.tiny_vit  # noqa: F401


def serve(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case; `code` is negative for a signal, 9 where it did not end."""
    started = time.monotonic()
    ended, ending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ended)
        run(case)
    os.close(ending)
    late = not select.select([ended], [], [], LIMIT_S)[0]
    if late:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(ended)
    shown = {name: _read(case["work"], name) for name in ("out", "err")}
    return {"name": case["name"], "code": code, "seconds": time.monotonic() - started, **shown}


def _read(work: str, name: str) -> str:
    path = os.path.join(os.fsencode(work), b".." , f"shown.{name}".encode())
    with open(path, "rb") as file:
        return file.read().decode("utf-8", "replace")


def run(case: dict[str, Any]) -> None:
    """In the child: never returns."""
    code = 70
    try:
        work = os.fsencode(case["work"])
        for number, name in ((1, "out"), (2, "err")):
            opened = os.open(os.path.join(work, b"..", f"shown.{name}".encode()), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, number)
            os.close(opened)
        os.chdir(os.path.join(work, os.fsencode(case.get("cwd", "."))))
        for name, value in case.get("env", {}).items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value.replace(WORK, case["work"])
        streams(case)
        surroundings(case)
        sys.argv = ["moee", *case["words"]]
        from exporter.cli import main as moee

        code = moee()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        with open(os.path.join(os.fsencode(case["work"]), b"..", b"shown.err"), "a") as file:
            traceback.print_exc(file=file)
    finally:
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        except (OSError, ValueError):
            code = 120  # as Python ends where its last flush fails
        os._exit(code)


def streams(case: dict[str, Any]) -> None:
    """Open, close and encode the standard streams as the case says."""
    if case.get("stdout") == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    if case.get("stdout") == "pipe without a reader":
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)
    if case.get("stdout") == "pipe that ends early":
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        if os.fork() == 0:
            os.read(reader, 1)
            os._exit(0)
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)
    coding = case.get("encoding", "utf-8")
    sys.stdout = open(1, "w", encoding=coding, errors="strict", closefd=False)  # noqa: SIM115 - as Python opens them
    sys.stderr = open(2, "w", encoding=coding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    for number in case.get("closed", ()):
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)


def surroundings(case: dict[str, Any]) -> None:
    """Take /proc away, make folders read-only or small, let the clock jump, or take the right to start more than so many
    processes and threads, as the case says. All but the clock need root."""
    if case.get("clock") == "jumps":
        real, away = time.time, itertools.cycle([0.0, -3600.0, 3e9, -1.7e9])  # into the next century, and before 1972
        time.time = lambda: real() + next(away)
    mounts: list[tuple[bytes, bytes, bytes | None, int, bytes | None]] = []
    if case.get("proc") == "none":
        mounts.append((b"none", b"/proc", b"tmpfs", 0, None))
    for folder, size_bytes in case.get("small", {}).items():
        mounts.append((b"none", os.path.abspath(os.fsencode(folder)), b"tmpfs", 0, b"size=%d" % size_bytes))
    for folder in case.get("fixed", ()):
        path = os.path.abspath(os.fsencode(folder))
        mounts += [(path, path, None, MS_BIND, None), (b"none", path, None, MS_BIND | MS_REMOUNT | MS_RDONLY, None)]
    if mounts:
        libc = ctypes.CDLL(None)
        private = libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        if private or any(libc.mount(*mount) for mount in mounts):
            os._exit(NOT_HERE)
    if "tasks" in case:  # root has no such limit
        resource.setrlimit(resource.RLIMIT_NPROC, (case["tasks"], case["tasks"]))
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_KEEPCAPS, 1)
        os.setuid(NOBODY)
        files = (1 << CAP_DAC_OVERRIDE, 1 << CAP_DAC_OVERRIDE, 0)  # effective, permitted: root's files stay readable
        if libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)(*files, 0, 0, 0)):
            os._exit(NOT_HERE)


if __name__ == "__main__":
    main()
