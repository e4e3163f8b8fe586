"""`python -m plugins.aot.search`: compile, model, print the page. Progress goes to standard error."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from moee.errors import UserError
from moee.parallel.machine import usable_cpus
from plugins.aot.search import page
from plugins.aot.search.candidates import VARIANTS, Group
from plugins.aot.search.choice import State, state
from plugins.aot.search.model import board_of
from plugins.aot.search.trials import Trials, compiled, workers
from plugins.devices import HOW, sm_named

SMS = (86, 87, 89, 90, 110, 120)  # those with a board to model them by
DTYPES = ("float16", "bfloat16")  # whose products take tensor cores, and whose values take two bytes


def search(groups: Sequence[Group], trials: Trials, most: int, until: float, count: int) -> list[State]:
    """Go on with every search until it is finished or `until` (`time.monotonic`) has come: in each round the most promising
    candidate of each. `most` candidates at most are compiled for one, by `count` processes."""
    pool = None
    try:
        while True:
            states = [state(group, trials, most) for group in groups]
            wanted = [(s.group, s.wanted) for s in states if s.wanted is not None]
            if not wanted or time.monotonic() >= until:
                return states
            pool = pool or (workers(min(count, len(wanted))) if count > 1 else None)
            for trial in compiled(pool, wanted, until):
                trials.add(trial)
                print(f"[{len(groups) - len(wanted)}/{len(groups)}] {trial.label} {trial.reason}", file=sys.stderr, flush=True)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 0, 1 if searches are unfinished, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m plugins.aot.search", description="Search tiles of kernels (no GPU needed).")
    parser.add_argument("--sm", action="append", help=f"device, repeatable: {HOW}; default {' '.join(map(str, SMS))}")
    parser.add_argument("--role", action="append", choices=VARIANTS, help="kernel, repeatable; default: all")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--results", type=Path, default=Path("build/tiles.jsonl"), help="file that is gone on from")
    parser.add_argument("--most", type=int, default=24, help="candidates to compile for each kernel and SM at most; default 24")
    parser.add_argument("--minutes", type=float, default=None, help="stop compiling after so long; default: at the end")
    parser.add_argument("--workers", type=int, default=min(usable_cpus(), 8), help="processes; default: one a core, at most 8")
    options = parser.parse_args(arguments)
    try:
        for name in ("most", "minutes", "workers"):
            value = getattr(options, name)
            if value is not None and not 0 < value < 1e6:
                raise UserError(f"--{name}: expected a number above 0 (came {value:g})")
        sms = list(dict.fromkeys(sm_named(name) for name in options.sm or map(str, SMS)))
        for sm in sms:
            board_of(sm)
        groups = [Group(sm, role, variant, options.dtype) for sm in sms for role in VARIANTS for variant in VARIANTS[role]
                  if not options.role or role in options.role]  # fmt: skip
        trials = Trials(options.results)
        until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
        states = search(groups, trials, options.most, until, options.workers)
        print(page.text(states, options.most), end="")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(s.finished for s in states) else 1


if __name__ == "__main__":
    sys.exit(main())
