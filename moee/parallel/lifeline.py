"""How the processes of a distributed run notice that one of them is gone: a TCP connection each to rank 0.

The kernel closes a killed process's connections at once, whatever its threads were doing, so nothing has to be polled and a rank
that computes for minutes without answering is not taken for dead. A machine that loses power is found by TCP keep-alive.
Rank 0 tells the others and every process stops: first by an interrupt, so that temporary folders are removed, and after
`GRACE_S` the hard way, since a thread that waits in a collective operation does not see interrupts.

A rank that lives and does nothing does not close its connections: `moee.parallel.pulse` tells it from one that works, on the same
connections.

PyTorch misses the case that the others compute. gloo and `monitored_barrier` notice at the next collective operation, nccl's
watchdog after the group's timeout, and torchrun's agent ends the ranks of its own machine alone, by SIGTERM. Measured with torch
2.14 and two gloo ranks, one killed by SIGKILL while the other had about 40 s to compute; seconds until that was gone too:

| started by | with this file | without |
|---|---|---|
| plain environment variables | 3.5 | 41.4 |
| two torchruns, as on two machines; the killed rank's launcher lives on | 1.6 | 39.7 |
| the same; that launcher is killed too, and did not hold the rendezvous store | 2.1 | 39.7 |
| one torchrun | 2.5, in good order | 0.3, temporary folders stay, nobody says why |
| plain, both in a barrier, and the killed rank leaves a forked child that lives for 25 s | 5.1 | 25.3 |

The last is why a thread that waits in gloo would not do: it notices a loss after 0.3 s, but a data loader's process holds gloo's
connections open, and gloo has no keep-alive.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moee.parallel.pulse import Pulse

log = logging.getLogger("moee")

GRACE_S = 5.0  # between the interrupt and the hard stop
CONNECT_S = 30.0
SIGTERM_PAUSE_S = 0.5  # torchrun ends all ranks when one dies: wait for the news of which one it was
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a silent machine is given up after 25 s
BYE, LOST, HUNG = b"b", b"l", b"h"
TOLD = re.compile(rb"[lh]\d+")


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


class Offer:
    """Rank 0's end before the others have connected: a listening socket and the token that a connection must bring."""

    def __init__(self) -> None:
        self.server = socket.create_server(("", 0))
        self.token = secrets.token_hex(16)

    @property
    def port(self) -> int:
        return self.server.getsockname()[1]

    def accept(self, world: int) -> dict[int, socket.socket]:
        """Connections by rank; those that do not come within `CONNECT_S` are left out."""
        found: dict[int, socket.socket] = {}
        deadline = time.monotonic() + CONNECT_S
        while len(found) < world - 1 and (left := deadline - time.monotonic()) > 0:
            self.server.settimeout(left)
            try:
                connection, _ = self.server.accept()
                connection.settimeout(2)
                token, _, rank = connection.recv(128).decode("ascii", "replace").partition(" ")
            except OSError:
                continue
            if secrets.compare_digest(token, self.token) and rank.isdecimal() and 0 < int(rank) < world:
                connection.settimeout(None)
                found[int(rank)] = _kept_alive(connection)
            else:
                connection.close()
        self.server.close()
        return found


def connect(host: str, port: int, token: str, rank: int) -> dict[int, socket.socket]:
    """The connection to rank 0, or nothing (with a warning) where the network does not let it through."""
    try:
        connection = socket.create_connection((host, port), CONNECT_S)
        connection.sendall(f"{token} {rank}".encode())
    except OSError as error:
        log.warning("rank %d cannot watch rank 0 (%s): the loss of a rank shows after --rank-timeout only", rank, error)
        return {}
    connection.settimeout(None)
    return {0: _kept_alive(connection)}


def _let_go(line: Lifeline | None) -> None:
    """In a forked child, such as a data loader's: its copies would keep the connections open when this process dies."""
    if line is not None:
        for connection in line.peers.values():
            connection.close()


class Lifeline:
    """Watches the connections, and SIGTERM, in a thread of its own. `reason` says what was lost, empty while all is well. `waits`
    is set while this rank waits for others."""

    def __init__(
        self, rank: int, world: int, local_rank: int, peers: dict[int, socket.socket], patience_s: float = float("inf")
    ):
        self.rank, self.world, self.local_rank, self.peers = rank, world, local_rank, peers
        self.waits, self.pulse = False, Pulse(rank, set(peers), patience_s)
        self.reason, self.speaks, self._interrupt = "", local_rank == 0, False
        self._handled, self._lock = threading.Event(), threading.Lock()
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)
        self._handlers: tuple[Any, int] | None = None
        if threading.current_thread() is threading.main_thread():
            # the C side of a handler writes the signal's number to the socket at once
            before = signal.signal(signal.SIGTERM, self._told)
            self._handlers = before, signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        here = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _let_go(here()))
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def _told(self, number: int, frame: object) -> None:
        """SIGTERM in the main thread: `_watch` deals with those from outside; after `_stop` it is the interrupt, once."""
        if self._interrupt and not self._handled.is_set():
            self._interrupt = False
            raise KeyboardInterrupt

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ, -1)
            for rank, connection in self.peers.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            stop_at = None
            while True:
                pause = self.pulse.pause() if stop_at is None else max(0.0, stop_at - time.monotonic())
                for key, _ in selector.select(pause):
                    try:
                        data = key.fileobj.recv(4096)  # type: ignore[union-attr]
                    except OSError:
                        data = b""
                    if key.data < 0:
                        if BYE in data:
                            return
                        if signal.SIGTERM in data and stop_at is None:
                            stop_at = time.monotonic() + SIGTERM_PAUSE_S
                    elif told := TOLD.search(data):
                        return self._lose([int(told[0][1:])], told[0].startswith(HUNG))
                    elif not data:
                        return self._lose([key.data])
                    elif BYE in data:
                        selector.unregister(key.fileobj)
                        self.pulse.forget(key.data)
                    else:
                        self.pulse.heard(key.data, data[-1:])
                if stop_at is not None and time.monotonic() >= stop_at:
                    return self._stop(
                        f"rank {self.rank} of {self.world} was told to stop (SIGTERM): the launcher does so when another rank "
                        "fails or the job is cancelled"
                    )
                if stop_at is None and self.pulse.due():
                    self._tell(self.pulse.beat(self.waits))
                    if hung := self.pulse.given_up():
                        return self._lose(hung, hung=True)

    def _tell(self, message: bytes, but: Iterable[int] = ()) -> None:
        for other, connection in self.peers.items():
            if other not in but:
                try:
                    connection.sendall(message)
                except OSError:
                    pass

    def _lose(self, ranks: list[int], hung: bool = False) -> None:
        if self.rank == 0:
            self._tell((HUNG if hung else LOST) + str(ranks[0]).encode(), but=() if hung else ranks)
        first = self.rank - self.local_rank
        self.speaks = self.rank == (first + 1 if ranks[0] == first else first)
        if not hung:
            return self._stop(f"rank {ranks[0]} of {self.world} was killed or failed, so the others stopped")
        named = f"rank {ranks[0]}" if len(ranks) == 1 else f"one of the ranks {', '.join(map(str, ranks))}"
        seconds = f"{self.pulse.patience_s:.0f} s (--rank-timeout)"
        self._stop(f"{named} of {self.world} hangs: no sign of work for {seconds}, so the others stopped")

    def _stop(self, reason: str) -> None:
        """Interrupt the main thread, and end the process if that does not help."""
        with self._lock:
            if self.reason or self._handled.is_set():
                return
            self.reason = f"{reason}; nothing is half-written, run the same command again to go on from the last saved step"
        self._interrupt = True
        main = threading.main_thread().ident
        if main is not None:
            # not SIGINT where it can be helped: a job in the background (`&` in a script) ignores that
            signal.pthread_kill(main, signal.SIGINT if self._handlers is None else signal.SIGTERM)
        if not self._handled.wait(GRACE_S):
            if self.speaks:
                print(f"moee: {self.reason}", file=sys.stderr, flush=True)
            os._exit(1)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block in which this rank waits for others."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def lost(self, wait_s: float = 0.0) -> str:
        """Why the run cannot go on, or empty. Waits: a collective operation may fail before the news is here."""
        deadline = time.monotonic() + wait_s
        while not self.reason and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.reason

    def acknowledge(self) -> None:
        """The main thread has seen `reason` and ends the process itself."""
        self._handled.set()

    def close(self) -> None:
        """Leave in good order: the others do not take the end of the connection for a loss."""
        for connection in self.peers.values():
            try:
                connection.sendall(BYE)
            except OSError:
                pass
        self._waker.send(BYE)
        self._thread.join(1)
        if self._handlers is not None:
            signal.set_wakeup_fd(self._handlers[1])
            signal.signal(signal.SIGTERM, self._handlers[0])
        for connection in (*self.peers.values(), self._wake, self._waker):
            connection.close()

    def await_leader(self, seconds: float) -> None:
        """Wait until rank 0 has closed its end, at most `seconds`: it has the last word on the terminal."""
        if self.rank and self.peers:
            self._thread.join(seconds)
