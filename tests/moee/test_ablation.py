"""Ablations: cells are resumable and shared, another set-up is refused, verdicts follow the numbers."""

import json

import pytest

import moee.ablation.cells
from moee.ablation.cells import cell_key, fitting_cells, read_cells
from moee.ablation.grid import TABLES, Cell, cells_of, make_ablation_config
from moee.ablation.run import run_ablation
from moee.ablation.summary import markdown, summarise
from moee.ablation.verdict import interpolate, judge
from moee.errors import UserError
from moee.methods.corp.method import CorpMethod
from moee.methods.moefication.options import MoeficationOptions
from moee.methods.recipe import method_options
from moee.methods.registry import METHODS
from moee.stages.session import Session
from tests.conftest import tiny_images, tiny_spec

SMALL = dict(tables=("8",), seeds=1, compensation=("none", "mean"), keeps=(0.7,), tokens=600, cluster_tokens=300,
             components=8, min_cluster_size=0.02)  # fmt: skip


@pytest.fixture
def session(monkeypatch):
    splits = tiny_images(40, classes=10), tiny_images(40, classes=10)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: splits)
    return Session(tiny_spec(), "digits")


@pytest.fixture
def counted(monkeypatch):
    """The configurations that are really run."""
    ran, real = [], moee.ablation.cells.run_cell

    def run_cell(session, config, sampled, probe):
        ran.append(config)
        return real(session, config, sampled, probe)

    monkeypatch.setattr(moee.ablation.cells, "run_cell", run_cell)
    return ran


def test_interrupted_run_goes_on_and_gives_the_same(session, counted, tmp_path, monkeypatch):
    config = make_ablation_config(**SMALL)
    whole = run_ablation(session, config, tmp_path / "whole")
    total = len(counted)
    assert total == 5 * 2 and len(read_cells(tmp_path / "whole")) == total
    counted.clear()
    real = moee.ablation.cells.write_json

    def interrupt(path, data):
        if len(counted) == 5:
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(moee.ablation.cells, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_ablation(session, config, tmp_path / "cut")
    monkeypatch.setattr(moee.ablation.cells, "write_json", real)
    damaged = next((tmp_path / "cut" / "cells").glob("*.json"))
    damaged.write_text(damaged.read_text()[:-9])
    counted.clear()
    resumed = run_ablation(session, config, tmp_path / "cut")
    assert len(counted) == total - 3, "four were finished, one of them damaged"
    assert resumed["tables"] == whole["tables"] and resumed["verdicts"] == whole["verdicts"]
    counted.clear()
    run_ablation(session, config, tmp_path / "cut")
    assert counted == []
    files = sorted((tmp_path / "cut" / "cells").glob("*.json"))
    files[0].rename(files[1])  # a result under another configuration's name
    broken = json.loads(files[2].read_text())
    broken["result"]["macs_change"] = "little"
    files[2].write_text(json.dumps(broken))
    assert len(read_cells(tmp_path / "cut")) == total - 3
    text = (tmp_path / "cut" / "table.md").read_text()
    assert "variance before magnitude" in text and "| random | mean |" in text
    assert json.loads((tmp_path / "cut" / "ablation.json").read_text())["schema"] == "moee.ablation/1"


def test_more_seeds_add_cells_and_another_set_up_is_refused(session, counted, tmp_path):
    one = make_ablation_config(**{**SMALL, "compensation": ("none",)})
    run_ablation(session, one, tmp_path)
    counted.clear()
    run_ablation(session, one.model_copy(update={"seeds": 2}), tmp_path)
    assert [c.seed for c in counted] == [1] * 5
    for changed, named in (({"cluster_tokens": 200}, "cluster_tokens 300, now 200"), ({"components": 4}, "components 8, now 4")):
        with pytest.raises(UserError, match=named):
            run_ablation(session, make_ablation_config(**{**SMALL, **changed}), tmp_path)
    session.source, session.train = "photos", tiny_images(44, classes=10)
    with pytest.raises(UserError, match="images"):
        run_ablation(session, one, tmp_path)


def test_a_folder_of_something_else_is_refused(session, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes.txt and not an ablation"):
        run_ablation(session, make_ablation_config(**SMALL), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_tables_share_cells_and_every_row_is_a_valid_configuration():
    cells = list(cells_of(make_ablation_config(seeds=1)))
    assert len({cell_key(c.options) for c in cells}) < len(cells)
    reference = {t: {cell_key(c.options) for c in cells if c.table == t and c.row == TABLES[t].reference} for t in TABLES}
    assert reference["2"] == reference["3"] == reference["7"] == reference["8"] == reference["9"]
    assert {c.options.compensation for c in cells if isinstance(c.options, MoeficationOptions)} == {"none", "mean"}


@pytest.mark.parametrize(("bad", "message"), [
    ({"tables": ("4",)}, "unknown table 4"), ({"keeps": (1.5,)}, "0..1"),
    ({"compensation": ("much",)}, "expected one of none, mean, refit"),
    ({"seeds": 0}, "--seeds"),
])  # fmt: skip
def test_bad_options_are_named(bad, message):
    with pytest.raises(UserError, match=message):
        make_ablation_config(**bad)


def test_layers_without_clusters_are_a_result_and_not_an_error(session, tmp_path):
    # one cluster holds nearly everything: no layer has two
    config = make_ablation_config(**{**SMALL, "tables": ("fig7",), "seeds": 1, "compensation": ("none",), "cluster_tokens": 12})
    summary = run_ablation(session, config, tmp_path)
    rows = summary["tables"]["fig7"]["rows"]
    assert any(row["dense_cells"] for row in rows)
    assert "all layers dense" in markdown(summary)


def results(table: str, figures: dict[str, list[tuple[float, list[float]]]]):
    """Results of a table by hand: per row, (MACs, accuracy of each seed)."""
    made = []
    for row, points in figures.items():
        for macs, accuracies in points:
            for seed, accuracy in enumerate(accuracies):
                cell = Cell(table, row, "none", seed, method_options(keep=1 + macs, seed=seed), "")
                figure = {"macs_change": macs, "accuracy": accuracy} if accuracy is not None else {}
                made.append((cell, {"status": "routed", **figure}))
    return made


@pytest.mark.parametrize(("theirs", "expected"), [
    ([0.5, 0.5, 0.5], "reproduced"), ([0.9, 0.9, 0.9], "reversed"), ([0.5, 0.9, 0.8], "undecided"), ([None] * 3, "not compared"),
    ([0.5, None, None], "undecided"),  # one seed has no standard deviation
    ([0.7 - 1e-9] * 3, "undecided"), ([0.7 + 1e-9] * 3, "undecided"),  # sums in another order
])  # fmt: skip
def test_verdicts_weigh_the_difference_against_the_seeds(theirs, expected):
    figures = {
        "variance": [(-0.4, [0.6, 0.6, 0.6]), (-0.2, [0.8, 0.8, 0.8])],
        "magnitude": [(-0.4, theirs), (-0.2, theirs)],
        "random": [(-0.4, [0.1] * 3), (-0.2, [0.2] * 3)],
    }
    verdicts = judge(results("8", figures), "accuracy")
    assert [v.verdict for v in verdicts] == [expected, "reproduced"]


def test_rows_are_compared_at_equal_macs():
    """The rival looks better at the same kept share only because it costs more."""
    figures = {
        "variance": [(-0.4, [0.60, 0.60]), (-0.2, [0.80, 0.80])],
        "magnitude": [(-0.3, [0.65, 0.65]), (-0.1, [0.85, 0.85])],
        "random": [(-0.1, [0.1, 0.1]), (-0.05, [0.2, 0.2])],
    }
    first, second = judge(results("8", figures), "accuracy")
    assert first.verdict == "reproduced" and first.pairs[0].differences == pytest.approx([0.05, 0.05])
    assert second.verdict == "not compared", "no common cost"


def test_an_ordering_over_several_pairs_can_be_mixed():
    figures = {
        "hdbscan": [(-0.2, [0.8, 0.8])], "dbscan": [(-0.2, [None, None])], "optics": [(-0.2, [0.7, 0.7])],
        "kmeans": [(-0.2, [0.75, 0.75])], "birch": [(-0.2, [0.5, 0.5])],
    }  # fmt: skip
    (verdict,) = judge(results("7", figures), "accuracy")
    assert verdict.verdict == "mixed"
    assert {(p.better, p.worse): p.verdict for p in verdict.pairs} == {
        ("hdbscan", "kmeans"): "reproduced", ("hdbscan", "birch"): "reproduced", ("optics", "kmeans"): "reversed",
        ("optics", "birch"): "reproduced", ("dbscan", "kmeans"): "not compared", ("dbscan", "birch"): "not compared",
    }  # fmt: skip


def test_interpolation_stays_within_the_curve():
    curve = [(-0.4, 0.2), (-0.2, 0.6)]
    assert interpolate(curve, -0.3) == pytest.approx(0.4) and interpolate(curve, -0.2) == pytest.approx(0.6)
    assert interpolate(curve, -0.5) is None and interpolate(curve, -0.1) is None and interpolate([], 0) is None


def test_spread_over_seeds():
    made = results("8", {"variance": [(-0.2, [0.7, 0.9])], "magnitude": [(-0.2, [0.5, 0.5])], "random": [(-0.2, [0.1, 0.1])]})
    summary = summarise({}, make_ablation_config(tables=("8",)), made)
    row = summary["tables"]["8"]["rows"][0]
    assert row["accuracy"] == {"mean": pytest.approx(0.8), "deviation": pytest.approx(0.1 * 2**0.5)}


def test_a_row_whose_method_cannot_cut_the_model_is_left_out_and_named(session, counted, tmp_path, monkeypatch, caplog):
    def refuse(self, model, shape, options):
        raise UserError("corp: `attn` is of another kind; give --corp-attention whole")

    monkeypatch.setattr(CorpMethod, "check", refuse)
    config = make_ablation_config(**{**SMALL, "tables": ("3",), "compensation": ("none",)})
    cells, left_out = fitting_cells(session, config)
    assert {cell.row for cell in cells_of(config)} - {cell.row for cell in cells} == set(left_out) == {"corp"}
    assert left_out["corp"] == "corp: `attn` is of another kind", "the cure is a flag of another command"
    few = [cell for cell in cells if cell.row == cells[0].row]
    monkeypatch.setattr("moee.ablation.run.fitting_cells", lambda *given: (few, left_out))
    run_ablation(session, config, tmp_path / "out")
    assert "Left out: corp. corp: `attn` is of another kind." in (tmp_path / "out" / "table.md").read_text()
    assert "row 'corp' is left out" in caplog.text


def test_an_ablation_of_which_nothing_fits_is_refused(session, monkeypatch):
    def refuse(self, model, shape, options):
        raise UserError("no; choose another model")

    for method in METHODS:
        monkeypatch.setattr(type(method), "check", refuse)
    with pytest.raises(UserError, match="choose another model"):
        fitting_cells(session, make_ablation_config(**SMALL))
