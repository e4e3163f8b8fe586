"""Plain progress lines, as a log file shows them."""

import io
import shutil

import pytest
from rich.table import Table

from exporter import cli
from exporter.commands.models import extract, plan
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


def test_a_step_of_the_same_name_begins_anew(monkeypatch):
    shown = lines([("fit", 0, 1), ("fit", 1, 1), ("other", 0, 1), ("fit", 1, 1)], monkeypatch)
    assert shown == ["fit: done in 11.0 s", "fit: done in 0.0 s"]


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


NAME = "stages.2.blocks.10.mlp"
LAYER = dict(name=NAME, experts=12, union=640, mean_width=480.0, hidden=1536, noise=0.33, notes=[])
ATTENTION = dict(name=NAME, heads=12, head_dim=64, qk=48, v=32, macs=123_400_000, dense_macs=234_500_000)
STAGE = {
    "retention": dict(images=719, labelled=719, accuracy=0.9791, dense_accuracy=0.975, accuracy_interval=[0.966, 0.987],
                      dense_accuracy_interval=[0.961, 0.984], top1_agreement=0.9847, class_cosine=0.9967, token_cosine=0.9942),
    "cost": {"dense": {"macs": 11_433_576_448, "params": 121_555_072}, "moee": {"macs": 8_443_989_968, "params": 114_973_207}},
}  # fmt: skip
SCORES = dict(name=NAME, scores=dict(sparsity=0.5, silhouette=0.123, sensitivity=0.12, score=0.3), ranks=[112, 8, 112, 8],
              router_accuracy=0.9999)  # fmt: skip
POINT = dict(method="kmeans-8", allocation="sensitivity", macs=0.7012, params=0.9012, cosine=0.9876, accuracy=0.9791,
             attention=0.85, accuracy_interval=[0.966, 0.987], recipe={},
             latency=dict(moee_ms=12.34, dense_ms=16.2, kind="measured"))  # fmt: skip
TABLES = {
    "layers": lambda: ui.layer_table([{**LAYER, "status": "routed"}]),
    "attention": lambda: ui.attention_table([ATTENTION]),
    "stages": lambda: ui.stage_table({"stages": {"extracted": STAGE, "tuned": STAGE}}, "m on d"),
    "scores": lambda: extract.clear_table([SCORES]),
    "plan": lambda: plan.points_table({"model": {"name": "m"}, "data": "d", "points": [POINT], "front": [], "winner": POINT}),
}
CELLS = {
    "layers": ["12", "640", "480", "1536", "33%"], "attention": ["12", "64", "48", "32", "123.4", "234.5"],
    "stages": ["97.50%", "96.1%", "98.4%", "114.973", "(-5.4%)", "0.9967"], "scores": ["50.00%", "0.123", "112+8", "99.99%"],
    "plan": ["winner", "70.12%", "90.12%", "0.9876", "97.91%", "96.6%", "12.34,", "1.31x", "(measured)"],
}


@pytest.mark.parametrize("name", TABLES)
def test_no_figure_is_cut_at_80_columns(name):
    out = io.StringIO()
    ui.plain_console(file=out, width=80).print(TABLES[name]())
    lines = out.getvalue().splitlines()
    assert "…" not in out.getvalue() and max(map(len, lines)) <= 80, out.getvalue()
    words = out.getvalue().replace("│", " ").split()
    assert [cell for cell in CELLS[name] if cell not in words] == [], out.getvalue()
    if name in ("layers", "attention", "scores"):
        first = [line.replace("│", " ").split() for line in lines]
        assert any(NAME.startswith(row[0]) and len(row[0]) > 10 for row in first if row), out.getvalue()


def test_the_console_is_as_wide_as_columns_says(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("exporter.commands.doctor.run", lambda args, console: seen.append(console.width) or 0)
    monkeypatch.delenv("COLUMNS", raising=False)
    assert cli.main(["doctor"]) == 0 and seen == [120]
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["doctor"]) == 0 and seen == [120, 60]


def test_moee_alone_shows_the_usual_sequence(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    sequence = ["moee extract", "moee finetune", "moee export", "moee verify", "moee bench", "moee bundle"]
    places = [shown.index(f"\n  {command} ") for command in sequence]
    assert places == sorted(places) and "usage: moee" in shown


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
