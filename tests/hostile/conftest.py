"""What the tests here tried, counted by kind: `pytest tests/hostile --count-kinds` ends with the table of docs/reliability.md."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.untrusted.conftest import made as made  # a fixture

TRIED = "tried"


def pytest_addoption(parser):
    parser.addoption("--count-kinds", action="store_true", help="print how many cases of each kind were tried, and what came")
    what = "keep the counts of each test there, and print the table of all that it holds: a long run may be done in parts"
    parser.addoption("--kinds-file", metavar="FILE", help=what)


@pytest.fixture
def tried(request):
    """Record `cases` of a `kind` in an `area`, and what came of them."""

    def record(area: str, kind: str, came: str, cases: int = 1) -> None:
        request.node.user_properties.append((TRIED, (area, kind, came, cases)))

    return record


def pytest_terminal_summary(terminalreporter):
    config = terminalreporter.config
    if not config.getoption("--count-kinds", False):
        return
    every = [each for some in terminalreporter.stats.values() for each in some if hasattr(each, "when")]
    reports = [each for each in every if each.when == "call" or each.failed]
    counted = {
        each.nodeid: {"failed": each.failed, "tried": [value for name, value in each.user_properties if name == TRIED]}
        for each in reports
    }
    path = config.getoption("--kinds-file")
    if path is not None:
        before = json.loads(Path(path).read_text()) if Path(path).is_file() else {}
        counted = {**before, **counted}
        Path(path).write_text(json.dumps(counted))
    kinds: dict[str, set[str]] = {}
    cases: Counter[str] = Counter()
    came: dict[str, Counter[str]] = {}
    for area, kind, what, count in (each for test in counted.values() for each in test["tried"]):
        kinds.setdefault(area, set()).add(kind)
        cases[area] += count
        came.setdefault(area, Counter())[what] += count
    write = terminalreporter.write_line
    write("| what is tried | kinds | cases | what came |")
    write("|---|---|---|---|")
    for area in kinds:
        what = ", ".join(f"{count} {name}" for name, count in came[area].most_common())
        write(f"| {area} | {len(kinds[area])} | {cases[area]} | {what} |")
    write(f"| all | {sum(map(len, kinds.values()))} | {sum(cases.values())} | |")
    write(f"{sum(test['failed'] for test in counted.values())} of {len(counted)} tests failed")
