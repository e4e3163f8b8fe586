"""Whether somebody works: the beats that ranks send each other.

Each rank sends a beat now and then, which says whether it has computed since the last one; its CPU time tells. So a rank that
works keeps the others waiting for as long as it takes, and a run is given up only when nobody has computed, or a rank has sent
nothing, for `patience_s`. What a library computes without letting Python run is seen at its end, so patience must be longer.
"""

from __future__ import annotations

import time

WORKED, WAITS, IDLE = b"w", b"q", b"i"  # has computed since the last beat; waits for the others; neither
BEATS = 12  # while nobody would lose patience
LEAST_BUSY = 0.01  # of a beat's time, that a rank which computes takes of a CPU


class Pulse:
    """Beats of this rank and the others': rank 0 hears of all, the others of rank 0 alone."""

    def __init__(self, rank: int, others: set[int], patience_s: float):
        self.rank, self.patience_s, self.every_s = rank, patience_s, patience_s / BEATS
        now = time.monotonic()
        self.next, self.cpu_s, self.worked = now + self.every_s, time.process_time(), now
        self.last = dict.fromkeys(others, now)
        self.state = dict.fromkeys({rank, *others}, WORKED)

    def pause(self) -> float | None:
        """Seconds to the next beat; None without an end."""
        return None if self.patience_s == float("inf") else max(0.0, self.next - time.monotonic())

    def due(self) -> bool:
        return time.monotonic() >= self.next

    def beat(self, waits: bool) -> bytes:
        """What this rank has to say of the time since its last beat."""
        now, cpu_s = time.monotonic(), time.process_time()
        worked = cpu_s - self.cpu_s > LEAST_BUSY * (now - self.next + self.every_s)
        self.next, self.cpu_s = now + self.every_s, cpu_s
        self._note(self.rank, WORKED if worked else WAITS if waits else IDLE)
        return self.state[self.rank]

    def heard(self, rank: int, state: bytes) -> None:
        self.last[rank] = time.monotonic()
        self._note(rank, state)

    def forget(self, rank: int) -> None:
        """It has left in good order."""
        self.last.pop(rank, None)
        self.state.pop(rank, None)

    def _note(self, rank: int, state: bytes) -> None:
        self.state[rank] = state
        if state == WORKED:
            self.worked = time.monotonic()

    def given_up(self) -> list[int]:
        """Ranks that hang, or of which one does; none while there is hope."""
        now = time.monotonic()
        silent = [rank for rank, heard in sorted(self.last.items()) if now - heard > self.patience_s]
        if silent:
            return silent[:1]
        if self.rank or now - self.worked <= self.patience_s:
            return []  # rank 0 knows of all
        return [rank for rank, state in sorted(self.state.items()) if state == IDLE] or sorted(self.state)
