"""`moee bench --beside`: exports of one dense model in the same turns, and what is refused."""

import json

import numpy as np
import pytest

from exporter import cli
from exporter.timing import side_by_side as module
from exporter.timing.ffn_bench import LayersReached
from exporter.timing.results_page import STEPS, page
from exporter.timing.side_by_side import side_by_side
from exporter.verdict import Verdict
from moee.errors import UserError


@pytest.fixture
def copies(tiny_export, tmp_path):
    """Two copies of an export that say what they cost."""
    folders = tiny_export.copy(tmp_path / "one"), tiny_export.copy(tmp_path / "other")
    for folder in folders:
        manifest = json.loads((folder / "export.json").read_text())
        cost = {"dense": {"macs": 3000, "params": 9}, "moee": {"macs": 2000, "params": 9}}
        (folder / "export.json").write_text(json.dumps(manifest | {"cost": cost}))
    return folders


def turns(monkeypatch, seconds):
    """Models that take so long a run, whatever they are; the number of calls in each batch."""
    counts = []

    def timed(calls, runs, *_):
        counts.append(len(calls))
        for call in calls:
            call()
        return np.array([[s] * runs for s in seconds])

    monkeypatch.setattr(module, "time_in_turns", timed)
    return counts


def test_all_are_timed_in_the_same_turns_of_each_batch(copies, monkeypatch):
    counts = turns(monkeypatch, [3.0, 2.0, 1.0])
    rows = side_by_side(copies, None, (1, 4), runs=12)
    assert counts == [3, 3] and [(r.name, r.batch) for r in rows] == [
        (folder.name, batch) for batch in (1, 4) for folder in copies
    ]  # fmt: skip
    assert [r.verdict.ratio for r in rows[:2]] == pytest.approx([1.5, 3.0])
    assert rows[0].share == pytest.approx(1.0) and rows[1].share == pytest.approx(2.0) and rows[0].dense_p50_ms == 3000


def test_exports_of_another_dense_model_are_refused(copies):
    manifest = json.loads((copies[1] / "export.json").read_text())
    other = manifest["files"] | {"dense.data": "0" * 64}
    for key, value, what in (("files", other, "weights"), ("precision", "fp16", "precision")):
        (copies[1] / "export.json").write_text(json.dumps(manifest | {key: value}))
        with pytest.raises(UserError, match=f"differs from .* in the (dense )?{what}"):
            side_by_side(copies, None, (1,), runs=1)


def test_the_table_of_the_command(copies, monkeypatch, capsys):
    turns(monkeypatch, [3.0, 2.0, 1.0])
    assert cli.main(["bench", str(copies[0]), "--beside", str(copies[1]), "--batches", "2", "--runs", "12"]) == 0
    out = capsys.readouterr().out
    assert "1.50x" in out and "3.00x" in out and "realised" in out and copies[1].name in out


def test_too_few_rounds_give_no_interval(copies, monkeypatch, capsys):
    turns(monkeypatch, [3.0, 2.0])
    assert cli.main(["bench", str(copies[0]), "--batches", "2", "--runs", "3", "--duration", "0"]) == 0
    assert "fewer than 10" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [["--engine", "E"], ["--profile"], ["--out", "latency.json"], ["--fail-if-slower"]])
def test_options_of_one_export_are_refused_beside_others(copies, flag, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", str(copies[0]), "--batches", "1,8", *flag]) == 2
    assert f"{flag[0]} is for one export at one --batch" in capsys.readouterr().err
    assert not (tmp_path / "latency.json").exists()


def test_an_ideal_that_nobody_knows_is_no_share():
    assert module.Reached("a", 1, "r", 2.0, 1.0, None, Verdict(2.0, 2.0, 2.0, 20)).share is None


def test_the_page_says_what_was_measured_and_on_what():
    far, near = Verdict(1.5, 1.4, 1.6, 40), Verdict(1.2, 0.5, 2.0, 3)
    machine = {"cpu": {"model": "Some CPU", "machine": "x86_64", "cores": 2, "load_1min": 0.25}}
    rows = [module.Reached("routed-export", 8, "onnxruntime", 60.0, 40.0, 1.6, far)]
    text = page(rows, [LayersReached("static", 1, 64, near, 2.4)], machine, machine, 2)
    assert "| 8 | routed | 60.0 | 40.0 | 1.50x (1.40 to 1.60) | 1.60x | 0.94 |" in text
    assert "| 1 | 64 | static | 1.20x (too few rounds for an interval) | 2.40x | 0.50 |" in text
    assert "Some CPU, 2 cores, 2 threads" in text and "0.25 and 0.25" in text


def test_the_commands_of_the_page_are_ones_that_exist():
    parser = cli.build_parser()
    for folder, command in STEPS:
        args = parser.parse_args(command.format(work="w").split())
        assert args.out == f"w/{folder}"
