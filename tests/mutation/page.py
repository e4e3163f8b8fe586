"""The page of results."""

from __future__ import annotations

from dataclasses import dataclass

from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.modules import Module
from tests.mutation.mutants import Mutant
from tests.mutation.trial import SURVIVED

PAGE = "docs/results/mutation.md"
HEAD = """# Mutation testing

A mutant is the source with one small fault: a comparison turned round or moved by one, `+` for `-`, `and` for `or`, a number one
higher, a condition negated, a decorator or a loop taken out. A test that knows what the code is for fails on it; the mutant is
killed then. What survives shows code that no test holds to anything. The mutants are
[cosmic-ray](https://cosmic-ray.readthedocs.io)'s; annotations and texts are not mutated.

    make mutate                                       # all five; writes this page
    .venv/bin/python -m tests.mutation refit          # one module
    .venv/bin/python -m tests.mutation --again        # the survivors once more, after tests were added

{drawn} mutants of each module were drawn by seed {seed} and tried by the module's quick tests, in forks of a process that has
everything loaded. Nothing is written into the source tree. Measured on two shared cores of an AMD EPYC (CPU).

**Tests were added for what survived of this sample**, so its score is no estimate for the other mutants; another `--seed`
gives one. The first round, with fewer tests, had killed 62 of 85 (routing), 17 of 22 (refit), 45 of 55 (selection), 14 of 19
(loading) and 15 of 19 (gates). What it had killed was not tried again; it had `test_convert.py`, `test_hierarchical.py`,
`test_verify.py` and `tests/untrusted/test_weights.py` too, which take longer.

Two other draws say what the tests do with mutants that they were not written for. The code written since version 0.2.0 had
changed this draw: before tests were added once more, killed were, of those that are not equivalent, 35 of 39 (routing), 31 of 40
(refit), 38 of 38 (selection), 37 of 40 (loading) and 38 of 40 (gates). Of `--seed 2 --count 25` they were 24 of 25, 19 of 23,
21 of 24, 23 of 25 and 22 of 25, 89 % in all; two of these, of a comparison that has nothing to compare, are killed now. Some of
the survivors are equivalent too: they have not been judged one by one.

"""


@dataclass(frozen=True)
class Tally:
    """What became of a module's mutants; `places`: how often an operator can be applied, from which they were drawn."""

    module: Module
    places: int
    outcomes: list[tuple[Mutant, str]]
    drawn: int

    @property
    def survivors(self) -> list[Mutant]:
        return [mutant for mutant, outcome in self.outcomes if outcome == SURVIVED and mutant.key not in EQUIVALENT]

    @property
    def equivalent(self) -> list[Mutant]:
        return [mutant for mutant, outcome in self.outcomes if outcome == SURVIVED and mutant.key in EQUIVALENT]

    @property
    def killed(self) -> int:
        return sum(outcome != SURVIVED for _, outcome in self.outcomes)

    @property
    def score(self) -> float:
        """Killed, of those that are not equivalent."""
        return self.killed / max(1, self.killed + len(self.survivors))

    @property
    def line(self) -> str:
        others = f"{len(self.equivalent)} equivalent, {len(self.survivors)} survived"
        counts = f"{len(self.outcomes)} tried, {self.killed} killed, {others}"
        return f"{self.module.name}: {counts}, score {self.score:.1%}"


def page(tallies: list[Tally], count: int, seed: int) -> str:
    """All of it, as Markdown."""
    rows = ["| module | files | possible | tried | killed | equivalent | survived | score |", "|---|---|---|---|---|---|---|---|"]
    for t in tallies:
        files = ", ".join(f"`{source}`" for source in t.module.sources)
        figures = (t.places, len(t.outcomes), t.killed, len(t.equivalent), len(t.survivors))
        rows.append(f"| {t.module.name} | {files} | {' | '.join(f'{n:,}' for n in figures)} | {t.score:.1%} |")
    tests = [f"- {t.module.name}: {', '.join(f'`{test}`' for test in t.module.tests if test[0] != '-')}" for t in tallies]
    parts = [
        HEAD.format(drawn=count, seed=seed) + "\n".join(rows),
        "*Possible* counts those too that change nothing (in annotations), which are not drawn. A mutant that does not end is\n"
        "killed. The score leaves equivalent ones out.\n\nThe tests:\n\n" + "\n".join(tests),
        "## Survivors\n\n" + ("\n".join(_row(m) for t in tallies for m in t.survivors) or "None."),
        "## Equivalent\n\nNo test can notice these.\n\n"
        + ("\n".join(f"{_row(m)}: {EQUIVALENT[m.key]}" for t in tallies for m in t.equivalent) or "None."),
    ]
    return "\n\n".join(parts) + "\n"


def _row(mutant: Mutant) -> str:
    return f"- `{mutant.file}`: `{_short(mutant.before)}` as `{_short(mutant.after)}`"


def _short(text: str) -> str:
    text = text.replace("`", "'")
    return text if len(text) <= 140 else f"{text[:137]}..."
