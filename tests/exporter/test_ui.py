"""Plain progress lines, as a log file shows them."""

import io
import shutil

import pytest
from rich.table import Table

from exporter import cli
from exporter.terminal import ui
from moee import progress
from moee.data.image_set import TensorSet


def lines(calls, monkeypatch, step=11.0):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    display = ui.ProgressDisplay(ui.plain_console(file=out, width=120))
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


ODD = "a[/x] [red]b :cat:"  # what rich would refuse, swallow and replace


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_names_as_they_are(terminal):
    out = io.StringIO()
    with ui.ProgressDisplay(ui.plain_console(file=out, width=120, force_terminal=terminal)) as display:
        display.line(ODD)
        for done in (0, 2):
            display(ODD, done, 2)
    assert out.getvalue().count(ODD) >= 2


def test_titles_cells_and_captions_show_names_as_they_are():
    out = io.StringIO()
    table = Table(title=ui.title_of({"stages": {}}, ODD, "data"), min_width=76)
    table.add_column(ODD)
    table.add_row(ODD)
    table.caption = ODD
    ui.plain_console(file=out, width=120).print(table)
    assert out.getvalue().count(ODD) == 4


def test_commands_work_on_folders_with_brackets(tiny_export, tmp_path, capsys, monkeypatch):
    wrong = [(label + 1) % 10 for label in tiny_export.data.labels]
    data = TensorSet(ODD, tiny_export.data.images, wrong, 10)
    monkeypatch.setattr("moee.data.sources.load_data", lambda *args, **kwargs: data)
    root = tmp_path / "a[" / "x] [red]b :cat:"
    shutil.copytree(tiny_export.root / "model", root / "model")
    assert cli.main(["export", str(root / "model"), "--out", str(root / "export")]) == 0
    assert str(root / "export") in capsys.readouterr().out
    assert cli.main(["verify", str(root / "export"), "--max-shapes", "2", "--opt-shapes", "2"]) == 0
    assert f"images in {ODD}" in capsys.readouterr().out.replace("\n", " ")
