"""Plain progress lines, as a log file shows them."""

import io

from rich.console import Console

from exporter import ui


def lines(calls, monkeypatch, step=11.0):
    now = [0.0]
    monkeypatch.setattr(ui.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    display = ui.ProgressDisplay(Console(file=out, width=120))
    for call in calls:
        display(*call)
        now[0] += step
    return out.getvalue().splitlines()


def test_a_known_length_gets_an_estimate_and_an_end(monkeypatch):
    shown = lines([("fit", 0, 4), ("fit", 1, 4), ("fit", 4, 4)], monkeypatch)
    assert shown == ["fit: 1/4, 11 s, about 33 s left", "fit: done in 22.0 s"]


def test_an_unknown_length_promises_nothing(monkeypatch):
    shown = lines([("join", 7, 0), ("join", 8, 0)], monkeypatch)
    assert shown == ["join: 8 so far, 11 s"]
