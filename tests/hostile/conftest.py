"""What the tests here tried, counted by kind: `pytest tests/hostile --count-kinds` ends with the table of docs/reliability.md."""

from __future__ import annotations

from collections import Counter

import pytest

TRIED = "tried"


def pytest_addoption(parser):
    parser.addoption("--count-kinds", action="store_true", help="print how many cases of each kind were tried, and what came")


@pytest.fixture
def tried(request):
    """Record `cases` of a `kind` in an `area`, and what came of them."""

    def record(area: str, kind: str, came: str, cases: int = 1) -> None:
        request.node.user_properties.append((TRIED, (area, kind, came, cases)))

    return record


def pytest_terminal_summary(terminalreporter):
    if not terminalreporter.config.getoption("--count-kinds", False):
        return
    kinds: dict[str, set[str]] = {}
    cases: Counter[str] = Counter()
    came: dict[str, Counter[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "call" else ():
                if name == TRIED:
                    area, kind, what, count = value
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
    failed = sum(len(terminalreporter.stats.get(name, ())) for name in ("failed", "error"))
    write(f"{failed} tests failed")
