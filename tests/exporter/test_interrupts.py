"""SIGTERM is an interrupt of the command, and no reason for a worker to speak; a build's worker never outlives it."""

import os
import signal
import subprocess
import sys

import pytest

from exporter.engines import worker
from exporter.terminal import interrupts


@pytest.fixture
def handlers(monkeypatch):
    """Signals as a process of its own has them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    interrupts.ARRIVED.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_ends_a_command_as_ctrl_c_does(handlers):
    interrupts.lose_none()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 5)
    assert interrupts.ARRIVED.is_set()


def test_a_copy_of_the_process_ends_by_it_as_ever(handlers):
    interrupts.lose_none()
    child = os.fork()
    if child == 0:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 5)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_worker_whose_command_was_killed_before_it_began_does_not_build():
    """The kernel's word for it comes only to those who asked before."""
    command = [sys.executable, "-S", "-E", worker.__file__, "no-spec.json", str(os.getpid() + 1)]
    done = subprocess.run(command, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
