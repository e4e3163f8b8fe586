"""kill -9 in the middle of every long command: inputs and earlier results stay, and the next run makes what an uninterrupted one
would have made, byte for byte, and clears away what the killed one left.

Points are the n-th call that changes a file (spread over the run, the call half done), and random moments.
"""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass

import pytest

from exporter.engines.plugin_cache import DEMO_SMS, ensure_kernels, ensure_plugin
from moee.store.cache import cache_dir
from tests.plugins import built
from tests.reliability import faults
from tests.reliability.commands import COMMANDS, copy, prepare
from tests.reliability.runner import tree

# command: points at changes of files over an earlier artifact, into an empty place, and at random moments
POINTS = {
    "extract": (55, 40, 35), "extract clear-moe": (25, 15, 15), "finetune": (65, 35, 35), "export": (9, 3, 4),
    "verify": (14, 6, 6), "bench": (9, 8, 4), "build": (8, 3, 4), "bundle": (8, 3, 3), "plan": (15, 8, 8),
    "ablate": (0, 18, 8), "ablate-clear": (0, 20, 8), "report": (8, 6, 4), "plots": (6, 3, 3), "demo": (0, 4, 1),
}  # fmt: skip
QUICK = {"extract": (3, 1, 1), "finetune": (3, 1, 1), "ablate-clear": (0, 2, 1)}
NEEDS_TRACE = {"export", "verify", "bench", "build", "bundle", "report", "demo"}


@dataclass
class Tally:
    points: int = 0
    killed: int = 0
    before: int = 0  # the output was as before the run (or absent)
    after: int = 0  # it was the new one, whole
    partly: int = 0  # a resumable output with some of its parts


def spread(count: int, total: int, seed: int) -> list[int]:
    """`count` points in 1..total: all of them if there are that few, else one drawn from each of as many equal stretches."""
    if count >= total:
        return list(range(1, total + 1))
    draw = random.Random(seed)
    edges = [1 + total * i // count for i in range(count + 1)]
    return [draw.randrange(low, high) for low, high in zip(edges, edges[1:], strict=False)]


def under(files: dict[str, str], name: str) -> dict[str, str]:
    return {k: v for k, v in files.items() if k == name or k.startswith(f"{name}/")}


def check_point(zygote, command, work, place, earlier, reference, tally, **fault):
    """Kill once, look at what is there, run again, compare."""
    run = copy(work, place / "point")
    protected = {k: v for k, v in tree(run, raw=True).items() if k.split("/")[0] not in (command.out, "cache", "tmp")}
    argv = command.forced() if earlier else command.argv
    outcome = zygote.run(argv, run, **fault, **command.options)
    tally.points += 1
    tally.killed += outcome.killed
    where = f"{command.name}, {fault}"
    assert outcome.killed or outcome.code == (1 if command.name in ("build", "demo") and fault.get("at") else 0), (
        f"{where}: exit {outcome.code}: {outcome.text}"
    )
    assert "Traceback" not in outcome.text, f"{where}: {outcome.text}"
    assert outcome.orphans == 0, f"{where}: {outcome.orphans} processes ran on after the kill"

    found = tree(run)
    raw = tree(run, raw=True)
    assert {k: raw.get(k) for k in protected} == protected, f"{where}: an input changed"
    output = under(found, command.out)
    if output == earlier:
        tally.before += 1
    elif output == under(reference, command.out):
        tally.after += 1
    else:
        assert command.resumes or command.name == "demo", f"{where}: half an output: {sorted(output)}"
        parts = {k: v for k, v in output.items() if not k.endswith("/") and "/." not in k and k in reference}
        if command.resumes:
            assert {k: reference[k] for k in parts} == parts, f"{where}: a part that is not the finished one"
        tally.partly += 1

    again = zygote.run(command.forced(), run, **command.options)
    assert again.code == 0, f"{where}, then: exit {again.code}: {again.text}"
    final = tree(run)
    assert final == reference, f"{where}: the next run made {difference(final, reference)}"


def difference(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    return [f"{k} ({'left over' if k not in theirs else 'missing' if k not in ours else 'other'})"
            for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]  # fmt: skip


def uninterrupted(zygote, command, work, place, argv):
    """Tree after a run without a fault, the number of changes, and its seconds."""
    run = copy(work, place / "point")
    outcome = zygote.run(argv, run, mode=faults.COUNT, **command.options)
    assert outcome.code == 0, outcome.text
    return tree(run), outcome.changes, outcome.seconds


def kill(zygote, name, points, place, record=None):
    command = COMMANDS[name]
    plugin = built.plugin() if name == "build" else None
    work = prepare(zygote, place, command, plugin, compiled(name))
    empty = copy(work, place / "empty")
    _clear(empty, command)
    shutil.rmtree(empty / "cache" / "labels", ignore_errors=True)
    tally, began = Tally(), time.monotonic()
    over, fresh, moments = points
    for at_changes, start, earlier in ((over, work, under(tree(work), command.out)), (fresh, empty, {})):
        if not at_changes:
            continue
        argv = command.forced() if earlier else command.argv
        reference, changes, seconds = uninterrupted(zygote, command, start, place, argv)
        for at in spread(at_changes, changes, seed=len(name)):
            check_point(zygote, command, start, place, earlier, reference, tally, mode=faults.KILL, at=at)
    draw = random.Random(name)
    for _ in range(moments):
        check_point(
            zygote, command, start, place, earlier, reference, tally, kill_after=draw.uniform(0.0, 1.05 * seconds)
        )
    if record:
        record(f"kill {name}", {"command": name, "changes": changes, "seconds": time.monotonic() - began, **vars(tally)})
    return tally


def compiled(name):
    """Folders of the real cache that the command reads and that take minutes to make."""
    if name == "bundle":
        return [ensure_kernels([87]).parent]
    if name == "demo":
        return [ensure_plugin(DEMO_SMS).parent.parent, cache_dir() / "kernels"]
    return []


def _clear(work, command):
    target = work / command.out
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


@pytest.mark.parametrize("name", list(QUICK))
def test_killed_commands(name, zygote, place):
    tally = kill(zygote, name, QUICK[name], place)
    assert tally.killed >= sum(QUICK[name]) - QUICK[name][2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list(POINTS))
def test_killed_at_many_points(name, tracing_zygote, place, record):
    tally = kill(tracing_zygote, name, POINTS[name], place, record)
    assert tally.points >= 0.9 * sum(POINTS[name])


def test_five_hundred_points():
    assert sum(map(sum, POINTS.values())) >= 500
