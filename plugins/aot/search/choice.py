"""Which candidate to compile next, and which one the model prefers in the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import exp, log

from plugins.aot.search.candidates import VARIANTS, Group, accumulators, candidates, least_shared
from plugins.aot.search.model import SETTINGS, Setting, Tile, board_of, layers, part_of, tile, time_us
from plugins.aot.search.trials import Trial, Trials
from plugins.tactics import Config

GAIN, WORST = 1.05, 0.97  # what a candidate must gain in the mean to be taken, and may lose at a layer
LEAST = 0.995  # the mean where the model assumes something else: bounds hide one another, so a gain may vanish but not turn
WORTH = 1.02  # candidates whose estimate gains less are not compiled
NEARER = 0.005  # a gain that further settings must have over nearer ones


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive values; `ValueError` for none."""
    logs = [log(value) for value in values]
    if not logs:
        raise ValueError("no values to take the mean of")
    return exp(sum(logs) / len(logs))


@cache
def times(group: Group, kernel: Tile, setting: Setting = SETTINGS[0]) -> tuple[float, ...]:
    """Modelled microseconds of a kernel for every layer of the account."""
    board = part_of(board_of(group.sm), setting.part)
    return tuple(time_us(layer, kernel, board, setting) for layer in layers(group.max_dim, setting.share))


@dataclass(frozen=True)
class Gain:
    """How many times as fast as the table's kernel: geometric mean and worst over the layers."""

    mean: float
    worst: float


def gain(group: Group, listed: Tile, kernel: Tile, setting: Setting = SETTINGS[0]) -> Gain:
    """Of `kernel` over `listed`."""
    ratios = [a / b for a, b in zip(times(group, listed, setting), times(group, kernel, setting), strict=True)]
    return Gain(geometric_mean(ratios), min(ratios))


@cache
def weakest(group: Group, listed: Tile, kernel: Tile) -> tuple[Gain, str]:
    """The lowest mean and the lowest worst case over all settings of the model, and the setting of the lowest mean."""
    every = [(gain(group, listed, kernel, setting), setting.name) for setting in SETTINGS]
    lowest = min(every, key=lambda pair: pair[0].mean)
    return Gain(lowest[0].mean, min(pair[0].worst for pair in every)), lowest[1]


def estimate(group: Group, listed: Trial, settings: Config) -> Tile:
    """A kernel that was not compiled: shared memory at its least, registers as the table's but for the sums, a quarter fewer."""
    own = accumulators(group.role, group.listed.block, group.listed.num_warps)
    registers = max(40, 3 * (listed.registers - own) // 4 + accumulators(group.role, settings.block, settings.num_warps))
    return tile(group.role, settings.block, settings.num_warps, settings.num_stages, registers=min(255, registers),
                shared_bytes=least_shared(group, settings), sm=group.sm)  # fmt: skip


@dataclass(frozen=True)
class Known:
    """A candidate that compiled within its limits."""

    settings: Config
    trial: Trial
    kernel: Tile


@dataclass(frozen=True)
class State:
    """How far a search is. `listed` is None until the table's own kernel is compiled; `wanted` is what to compile next, None at
    the end; `left` are candidates beyond the number that a search may compile."""

    group: Group
    listed: Known | None
    best: Known | None
    wanted: Config | None
    compiled: int
    dropped: int
    left: int

    @property
    def finished(self) -> bool:
        return self.wanted is None


def state(group: Group, trials: Trials, most: int) -> State:
    """From the results that there are. Candidates come in the order of what an estimate promises; the search ends where none
    that is left promises more than the best, or `most` were compiled. Raises `ValueError` if the table's kernel was dropped."""
    listed_settings, *others = candidates(group)
    first = trials.get((group, listed_settings))
    if first is None:
        return State(group, None, None, listed_settings, 0, 0, 0)
    kernel = first.tile(group, listed_settings)
    if kernel is None or not kernel.resident:
        raise ValueError(f"the table's own kernel was dropped: {first.label}: {first.reason}")
    listed = Known(listed_settings, first, kernel)
    best, dropped = listed, 0
    score = 1.0
    found = [(settings, trial) for settings in others if (trial := trials.get((group, settings)))]
    for settings, trial in found:
        kernel = trial.tile(group, settings)
        if kernel is None or not kernel.resident:
            dropped += 1
            continue
        mean = gain(group, listed.kernel, kernel).mean
        if mean > score + NEARER and holds(group, listed.kernel, kernel):  # found lists the nearest first
            best, score = Known(settings, trial, kernel), mean
    done, enough = {settings for settings, _ in found}, len(found) + 1 >= most
    promising = [
        settings
        for promise, settings in _promises(group, first)
        if promise > max(WORTH, score + NEARER) and settings not in done
    ]
    left = [c for c in promising if holds(group, listed.kernel, estimate(group, first, c))] if enough else []
    wanted = None if enough else next((c for c in promising if holds(group, listed.kernel, estimate(group, first, c))), None)
    return State(group, listed, best, wanted, len(found) + 1, dropped, len(left))


def holds(group: Group, listed: Tile, kernel: Tile) -> bool:
    """Whether a kernel loses nothing to speak of, whatever the model assumes."""
    least = weakest(group, listed, kernel)[0]
    return least.mean >= LEAST and least.worst >= WORST


@cache
def _promises(group: Group, listed: Trial) -> tuple[tuple[float, Config], ...]:
    """(estimated gain, settings) of those that lose nowhere, the most promising first; of alike ones the nearest to the table."""
    own = listed.tile(group, group.listed)
    assert own is not None
    found = []
    for settings in candidates(group)[1:]:
        kernel = estimate(group, listed, settings)
        if kernel.resident:
            promise = gain(group, own, kernel)
            if promise.worst >= WORST:
                found.append((round(promise.mean, 3), settings))
    return tuple(sorted(found, key=lambda pair: -pair[0]))  # stable: candidates come nearest first


def chosen(states: dict[tuple[str, str], State], group: Group) -> list[int] | None:
    """The layers at which the table's kernel of a group belongs to the fastest tactic, by position: the tile of fewest
    microseconds for both maps, within 5 %. None unless the kernels of all tiles are there. Other roles: all layers."""
    if not group.role.startswith("expert_"):
        return list(range(len(layers(group.max_dim))))
    if not all((role, variant) in states for role in ("expert_up", "expert_down") for variant in VARIANTS[role]):
        return None
    sums: dict[str, list[float]] = {}
    for (role, variant), state in states.items():
        if not role.startswith("expert_"):
            continue
        if state.listed is None:
            return None
        own = times(state.group, state.listed.kernel)
        sums[variant] = [a + b for a, b in zip(sums.get(variant, [0.0] * len(own)), own, strict=True)]
    fastest = [min(column) for column in zip(*sums.values(), strict=True)]
    return [i for i, own in enumerate(sums[group.variant]) if own <= 1.05 * fastest[i]]


def gain_there(states: dict[tuple[str, str], State], state: State) -> float | None:
    """The best candidate's geometric mean at the layers where its tile is chosen; None if those are unknown, or none."""
    at = chosen(states, state.group)
    if not at or state.listed is None or state.best is None:
        return None
    before, after = times(state.group, state.listed.kernel), times(state.group, state.best.kernel)
    return geometric_mean(before[i] / after[i] for i in at)


def taken(states: dict[tuple[str, str], State], state: State) -> bool:
    """Whether the best candidate, which loses nothing whatever the model assumes, is faster by enough: over all layers, and over
    those at which its tile is chosen."""
    if not state.finished or state.listed is None or state.best is None or state.best is state.listed:
        return False
    there = gain_there(states, state)
    return there is not None and min(there, gain(state.group, state.listed.kernel, state.best.kernel).mean) >= GAIN
