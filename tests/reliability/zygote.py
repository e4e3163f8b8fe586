"""A warm process that forks one child a command: everything is imported once, and a child starts in milliseconds.

    LD_PRELOAD=faults.so FAULTS=plan python -m tests.reliability.zygote

One JSON request a line on stdin (see `tests/reliability/runner.py`), one JSON answer a line on stdout. The process runs one
thread only, so that a fork copies no lock that another thread holds.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
NOBODY = 65534
PATIENCE_S = 30  # until a command that is interrupted has ended


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _warm_up(sys.argv[1:])
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    threads = len(os.listdir("/proc/self/task"))
    print(json.dumps({"threads": threads}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _serve_crowd(request) if "crowd" in request else _serve(request)
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # what was imported takes seconds to take down


def _warm_up(parts: list[str]) -> None:
    """Import what the commands import inside their functions."""
    import torch

    torch.set_num_threads(1)
    import exporter.clear_ablation
    import exporter.cli
    import exporter.demo
    import exporter.plots
    import exporter.verification  # noqa: F401
    import moee.ablation
    import moee.methods.clear_moe
    import moee.planning  # noqa: F401
    import tests.reliability.tiny_vit  # noqa: F401

    if "trace" in parts:  # what the first torch.onnx.export imports takes seconds
        from exporter.graph.trace import to_onnx

        to_onnx(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.zeros(2, 4))


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    reader, writer = os.pipe()  # ends with the child: select sees that, also when it is killed
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run(request)
    os.close(writer)
    limit = request.get("kill_after") or request.get("interrupt_after") or request.get("timeout", 120)
    ended, _, _ = select.select([reader], [], [], limit)
    late = not ended
    if late and "interrupt_after" in request:
        os.kill(child, signal.SIGINT)
        late = not select.select([reader], [], [], PATIENCE_S)[0]
    if late:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    seconds = time.monotonic() - started
    orphans = _reap()
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "seconds": seconds, "late": late and not request.get("kill_after"), "orphans": orphans}


def _serve_crowd(request: dict[str, Any]) -> dict[str, Any]:
    """Run several command lines at once; their exit codes in order."""
    children = []
    for index, argv in enumerate(request["crowd"]):
        child = os.fork()
        if child == 0:
            _run({**request, "argv": argv, "log": f"{request['log']}.{index}"})
        children.append(child)
    return {"codes": [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]}


def _reap(patience_s: float = 5.0) -> int:
    """Wait for what the command left running; the number of processes that had to be killed."""
    until, killed = time.monotonic() + patience_s, 0
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return killed
        if pid == 0 and time.monotonic() > until:
            for orphan in _children():
                os.kill(orphan, signal.SIGKILL)
                killed += 1
            until = time.monotonic() + patience_s
        if pid == 0:
            time.sleep(0.01)


def _children() -> list[int]:
    return [int(p) for p in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _run(request: dict[str, Any]) -> None:
    """In the child: never returns."""
    code = 70
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(request["cwd"])
        os.environ.update(request.get("env", {}))
        import tempfile

        # not None: the search for a usable folder writes a probe file, which a kill would leave
        tempfile.tempdir = os.environ["TMPDIR"]
        for name, value in request.get("limits", {}).items():
            resource.setrlimit(getattr(resource, name), (value, value))
        if request.get("unprivileged"):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        code = _command(request)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:  # before the command line began, or after its end
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command(request: dict[str, Any]) -> int:
    from exporter.cli import main as moee
    from exporter.terminal.interrupts import lose_none

    lose_none()
    if request.get("small_demo"):
        _shrink_demo(Path(request["cwd"]) / "w.safetensors")
    return moee(request["argv"])


def _shrink_demo(weights: Path) -> None:
    """`moee demo` on the tiny model, with a second of measurements instead of ten."""
    import functools

    import exporter.demo as demo
    from exporter.pretrained import ModelOptions, resolve
    from tests.reliability.tiny_vit import NAME

    demo.resolve = lambda model, data, report: resolve(NAME, data, ModelOptions(checkpoint=str(weights)), report)
    demo.bench = functools.partial(demo.bench, runs=2, duration_s=0.0, throughput_s=0.0)


if __name__ == "__main__":
    main()
