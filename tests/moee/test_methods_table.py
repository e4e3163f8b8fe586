"""The table of methods: rows are plans that are kept, gone on from and made again where their options changed."""

import pytest

from exporter.cli import build_parser
from moee.errors import UserError
from moee.models.model import ModelSpec
from moee.planning import table
from moee.planning.plan import check_ways
from moee.planning.search import ALLOCATIONS, variants
from moee.planning.table import ROWS, Case, begun, fill, made, page, refused
from moee.stages.session import Session
from tests.conftest import TINY, tiny_images

CASE = Case("tiny", "tiny", "A tiny model.")
QUICK = {"tokens": 300, "cluster_tokens": 200, "refit_tokens": 300, "sensitivity_tokens": 300}


@pytest.fixture
def opened(monkeypatch):
    """A function that opens a session, and how often it was called."""
    train, held = tiny_images(30, classes=10), tiny_images(20, classes=10)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (train, held))
    monkeypatch.setattr(table, "SCALE", QUICK)
    monkeypatch.setattr(table, "TARGETS", (0.8, 0.65))
    calls = []

    def session():
        calls.append(0)
        kwargs = {**TINY, "num_classes": 0, "depth": 1}
        return Session(ModelSpec(name="tiny", timm_name="vit_tiny_patch16_224", kwargs=kwargs, random_seed=0), "tiny")

    session.calls = calls
    return session


def rows(*names):
    return [row for row in ROWS if row.name in names]


def test_rows_are_made_once_and_stand_in_the_table(opened, tmp_path, monkeypatch):
    ours = rows("static", "lowrank")
    assert fill(CASE, ours, tmp_path, opened) and fill(CASE, ours, tmp_path, opened) and len(opened.calls) == 1
    text = page([CASE, Case("other", "tiny")], tmp_path, "# Head")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| −")]
    assert "## other" not in text and len(lines) == 2 * 3, "two ways of static pruning and low-rank maps at two budgets"
    assert {cells[1] for cells in lines} == {*ours[0].called.values(), "low-rank maps"}
    assert [cells[0] for cells in lines] == ["−20 %"] * 3 + ["−35 %"] * 3 and {cells[-1] for cells in lines} == {"no"}
    assert "Dense accuracy" in text and all(cells[5].endswith(")") for cells in lines)
    assert text.count("**") >= 2 * 2, "the best cosine of each budget is bold"
    cosines = [float(cells[4].strip("*")) for cells in lines[:3]]
    assert cosines == sorted(cosines, reverse=True)
    assert "    moee plan tiny --data tiny --methods static --allocations share,sensitivity --targets 0.8,0.65 " in text
    assert "Made too" not in text
    with monkeypatch.context() as patch:
        patch.setattr(table, "NEAR", -1.0)
        far = page([CASE], tmp_path, "")
    assert far.count(": cosine 0.") == 6 and "| −20 %" not in far, "what is far from every budget is named below"
    monkeypatch.setattr(table, "SCALE", {**QUICK, "tokens": 299})
    assert made(CASE, ours[0], tmp_path) is None, "a row of other options is none of the table"
    assert "static pruning" not in page([CASE], tmp_path, "")


def test_time_that_is_over_leaves_rows_for_the_next_run_and_a_refusal_is_told(opened, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise UserError("tokens cannot be merged")

    ours, answers = rows("static", "tokens"), iter([True, False, False])
    assert not fill(CASE, ours, tmp_path, opened, over=lambda: next(answers)) and not opened.calls
    monkeypatch.setattr(table, "make_plan", refuse)
    assert fill(CASE, ours, tmp_path, opened, over=lambda: next(answers))
    assert refused(CASE, ours[1], tmp_path) == "tokens cannot be merged" and made(CASE, ours[1], tmp_path) is None
    assert fill(CASE, ours, tmp_path, opened, over=lambda: next(answers)), "it is not tried again"


def test_points_of_an_interrupted_row_stand_in_the_table(opened, tmp_path, monkeypatch):
    (row,), real, seen = rows("static"), Session.measure, []

    def stop(session, model, probe, message):
        seen.append(message)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(session, model, probe, message)

    monkeypatch.setattr(Session, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        fill(CASE, [row], tmp_path, opened)
    assert made(CASE, row, tmp_path) is None and len(begun(CASE, row, tmp_path)) == 2
    lines = [line for line in page([CASE], tmp_path, "").splitlines() if line.startswith("| −")]
    assert len(lines) == 2 and all("equal shares" in line for line in lines)
    monkeypatch.setattr(table, "SCALE", {**QUICK, "tokens": 299})
    assert begun(CASE, row, tmp_path) is None and page([CASE], tmp_path, "").strip() == ""
    monkeypatch.setattr(table, "make_plan", lambda *args, **kwargs: seen.clear())
    fill(CASE, [row], tmp_path, lambda: None)
    assert not seen and not list(tmp_path.glob("*/*.resume")), "what other options began is removed, and refuses nothing"


def test_every_row_is_a_plan_that_can_be_asked_for():
    """Names and options of the table are those of `moee plan`."""
    for row in ROWS:
        check_ways((row.method,), row.allocations or ALLOCATIONS, (1.0,), row.base)
        own = tuple(variants()[row.method][0].allocations)
        assert row.allocations or tuple(row.called) == own, row.name
        args = build_parser().parse_args(row.command("dinov2-s", "digits").split()[1:])
        assert {name: getattr(args, name) for name in row.base} == row.base
