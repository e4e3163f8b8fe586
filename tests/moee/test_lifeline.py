"""What a rank does when a connection ends, with and without a goodbye."""

import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from moee.errors import RankLost
from moee.parallel import joining, pulse
from moee.parallel.lifeline import BYE, HUNG, LOST, Lifeline, Offer, connect
from moee.parallel.pulse import IDLE, WAITS, WORKED


@pytest.fixture
def line():
    """A lifeline of rank 0 of 3 and the far ends of its connections."""
    pairs = {rank: socket.socketpair() for rank in (1, 2)}
    made = Lifeline(0, 3, 0, {rank: pair[0] for rank, pair in pairs.items()})
    yield made, {rank: pair[1] for rank, pair in pairs.items()}
    made.acknowledge()
    made.close()


def wait_for_interrupt(after):
    """Call `after`; the interrupt may come before it returns."""
    with pytest.raises(KeyboardInterrupt):
        after()
        for _ in range(200):
            time.sleep(0.05)


def test_a_dead_rank_interrupts_and_is_named_to_the_others(line):
    made, ends = line
    started = time.monotonic()
    wait_for_interrupt(ends[2].close)
    made.acknowledge()
    assert time.monotonic() - started < 2
    assert "rank 2 of 3 was killed or failed" in made.reason and made.speaks
    assert ends[1].recv(16) == LOST + b"2"


def test_a_child_process_does_not_hold_the_line(line):
    made, ends = line
    made.acknowledge()  # the end of its own connections is no news here
    time.sleep(0.2)  # it watches them by now
    child = os.fork()
    if child == 0:
        time.sleep(3)
        os._exit(0)
    for connection in made.peers.values():
        connection.shutdown(socket.SHUT_RD)  # only this process's end: what a kill does to it
        connection.close()
    ends[1].settimeout(1)
    assert ends[1].recv(1) == b"", "the child's copy keeps the connection open"
    made.peers.clear()
    os.waitpid(child, 0)


def test_a_goodbye_is_no_loss(line):
    made, ends = line
    ends[1].sendall(BYE)
    ends[1].close()
    time.sleep(0.3)
    assert made.reason == ""


def test_the_launchers_signal_is_explained(line):
    made, _ = line
    wait_for_interrupt(lambda: os.kill(os.getpid(), signal.SIGTERM))
    made.acknowledge()
    assert "SIGTERM" in made.reason


def test_a_job_in_the_background_is_interrupted_too(line):
    """A shell script starts `command &` with SIGINT ignored."""
    made, ends = line
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        started = time.monotonic()
        wait_for_interrupt(ends[2].close)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 2 and "rank 2 of 3" in made.reason
    os.kill(os.getpid(), signal.SIGTERM)  # torchrun's, soon after: one interrupt is enough
    time.sleep(0.2)


def test_the_lowest_rank_left_on_a_machine_speaks():
    near, far = socket.socketpair()
    made = Lifeline(3, 4, 1, {0: near})  # ranks 2 and 3 share the machine
    wait_for_interrupt(lambda: far.sendall(LOST + b"2"))
    made.acknowledge()
    made.close()
    assert made.speaks and "rank 2 of 4" in made.reason


@pytest.mark.parametrize("late", [True, False], ids=["interrupt while asking", "lost in the last barrier"])
def test_the_lost_rank_is_named_whatever_fails_first(monkeypatch, late):
    """gloo's error may come before the lifeline's interrupt, which then hits the handler of that error."""

    class Line:
        reason, speaks = "rank 1 of 2 was killed or failed", True

        def lost(self, wait_s):
            if late:
                raise KeyboardInterrupt
            return self.reason

        def acknowledge(self):
            pass

    def barrier():
        raise RuntimeError("gloo: connection closed by peer")

    monkeypatch.setattr(joining, "_assembled", lambda *a: SimpleNamespace(lifeline=Line(), barrier=barrier))
    with pytest.raises(RankLost, match="rank 1 of 2"), joining._ranked((0, 2, 0), 60.0, "cpu"):
        if late:
            barrier()


def beating(patience_s=0.6):
    """A lifeline of rank 0 of 3 that loses patience soon, and the far ends."""
    pairs = {rank: socket.socketpair() for rank in (1, 2)}
    return Lifeline(0, 3, 0, {rank: pair[0] for rank, pair in pairs.items()}, patience_s), [pair[1] for pair in pairs.values()]


def told_for(seconds, ends, *states):
    """Beats of the far ends while this rank does nothing."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for end, state in zip(ends, states, strict=True):
            if state:
                end.sendall(state)
        time.sleep(0.05)


@pytest.mark.parametrize(
    "states, named",
    [
        ((IDLE, WAITS), "rank 1 of 3"),  # rank 0 waits, too
        ((WAITS, b""), "rank 2 of 3"),  # stopped, with SIGSTOP for example
        ((WAITS, WAITS), "one of the ranks 0, 1, 2 of 3"),
    ],
)
def test_a_rank_that_lives_and_does_nothing_is_named(monkeypatch, states, named):
    monkeypatch.setattr(pulse.time, "process_time", lambda: 0.0)
    made, ends = beating()
    try:
        with made.waiting(), pytest.raises(KeyboardInterrupt):
            told_for(5, ends, *states)
    finally:
        made.acknowledge()
        made.close()
    assert f"{named} hangs: no sign of work for 1 s (--rank-timeout)" in made.reason
    assert b"".join(end.recv(4096) for end in ends).count(HUNG) == 2


def test_a_rank_that_works_keeps_the_others_waiting(monkeypatch):
    monkeypatch.setattr(pulse.time, "process_time", lambda: 0.0)
    made, ends = beating()
    with made.waiting():
        told_for(2.5, ends, WAITS, WORKED)
    assert made.reason == ""
    made.acknowledge()
    made.close()


def test_a_leader_without_a_sign_of_life_is_named_by_the_others():
    near, _far = socket.socketpair()
    made = Lifeline(1, 2, 1, {0: near}, 0.6)
    wait_for_interrupt(lambda: None)
    made.acknowledge()
    made.close()
    assert made.speaks and "rank 0 of 2 hangs" in made.reason


def test_only_a_connection_with_the_token_is_accepted():
    offer, found = Offer(), {}
    accepting = threading.Thread(target=lambda: found.update(offer.accept(3)))
    accepting.start()
    stranger = socket.create_connection(("127.0.0.1", offer.port))
    stranger.sendall(b"guess 1")
    ours = [connect("127.0.0.1", offer.port, offer.token, rank) for rank in (1, 2)]
    accepting.join(10)
    assert sorted(found) == [1, 2] and all(0 in peer for peer in ours)
    assert stranger.recv(1) == b"", "a stranger's connection must be closed"
    for connection in (stranger, *found.values(), *(peer[0] for peer in ours)):
        connection.close()
