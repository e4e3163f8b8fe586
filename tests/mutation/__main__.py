"""Mutation testing of the modules whose faults would be silent; `make mutate` runs all and writes docs/results/mutation.md.

`python -m tests.mutation [MODULE ...]` goes on where it was stopped: outcomes are kept in build/mutation while the sources stay
as they are. Needs cosmic-ray (the extra `mutation`). Exit code 1 if a score is below 90 %.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutation.modules import MODULES, Module
from tests.mutation.mutants import sample
from tests.mutation.page import PAGE, Tally, page
from tests.mutation.trial import SURVIVED, preload, tried

ROOT = Path(__file__).resolve().parent.parent.parent
KEPT = ROOT / "build" / "mutation"
WANTED = 0.9
COUNT = 40


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.mutation", description=__doc__)
    parser.add_argument("modules", nargs="*", help="which (all)", metavar="MODULE")
    parser.add_argument("--count", type=int, default=COUNT, help=f"mutants drawn of each module ({COUNT})")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (0)")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many; the same command goes on")
    parser.add_argument("--again", action="store_true", help="try survivors once more")
    args = parser.parse_args(argv)
    if unknown := set(args.modules) - {module.name for module in MODULES}:
        parser.error(f"no module {', '.join(sorted(unknown))}; there are {', '.join(module.name for module in MODULES)}")
    until = time.time() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="moee-mutation-") as folder:
        os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MOEE_CACHE=f"{folder}/cache", TMPDIR=folder, PYTEST_ADDOPTS="")
        tempfile.tempdir = folder
        chosen = [module for module in MODULES if not args.modules or module.name in args.modules]
        tallies = [tally(module, args.count, args.seed, until, args.again) for module in chosen]
    for each in tallies:
        for mutant in each.survivors:
            print(f"{mutant.file}:{mutant.line}: {mutant.before}\n    as: {mutant.after}")
    print(*(each.line for each in tallies), sep="\n")
    whole = all(len(each.outcomes) == each.drawn for each in tallies)
    if whole and not args.modules:
        (ROOT / PAGE).write_text(page(tallies, args.count, args.seed), encoding="utf-8")
        print(f"written to {PAGE}")
    return 0 if whole and all(each.score >= WANTED for each in tallies) else 1


def tally(module: Module, count: int, seed: int, until: float, again: bool) -> Tally:
    """Try what has no outcome yet."""
    mutants, places = sample(ROOT, module.sources, count, seed)
    path = KEPT / f"{module.name}.jsonl"
    known = dict(json.loads(line) for line in path.read_text().splitlines()) if path.is_file() else {}
    numbers = {hashlib.sha256(f"{m.file}\n{m.text}".encode()).hexdigest(): m for m in mutants}
    names = {id(m): name for name, m in numbers.items()}
    todo = [m for name, m in numbers.items() if name not in known or (again and known[name] == SURVIVED)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if todo and time.time() < until:
        preload()
        with open(path, "a") as file:
            for done, (mutant, outcome) in enumerate(tried(ROOT, module, todo, until, KEPT), 1):
                known[names[id(mutant)]] = outcome
                file.write(json.dumps([names[id(mutant)], outcome]) + "\n")
                file.flush()
                print(f"{module.name} {done}/{len(todo)} {mutant.file}:{mutant.line} {outcome}", flush=True)
    return Tally(module, places, [(m, known[name]) for name, m in numbers.items() if name in known], len(mutants))


if __name__ == "__main__":
    sys.exit(main())
