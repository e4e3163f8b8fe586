"""What a compression goes on from: stages that were removed or interrupted by hand, and refusals that leave the place alone."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from exporter.compress.job import Job
from exporter.compress.request import Request
from exporter.compress.state import State
from exporter.compress.tuning import worth
from moee.data.image_set import TensorSet
from moee.errors import BudgetUnmet, OutOfReach, UserError
from moee.places.staged_folder import StagedFolder
from moee.planning.budget import Budget
from tests.exporter.test_compress import FAST, interrupted, quick, session  # noqa: F401

REQUEST = Request(Budget(min_cosine=0.9), time_s=None, **FAST)


def state_of(out):
    return State(StagedFolder(out), {"a": 1})


def test_a_stage_that_is_made_anew_takes_those_made_of_it_along(tmp_path):
    state = state_of(tmp_path / "out")
    state.open()
    for stage in ("plan", "extracted", "tuned", "export"):
        (tmp_path / "out" / stage).mkdir()
        state.add(stage, {})
    shutil.rmtree(tmp_path / "out" / "extracted")
    again = state_of(tmp_path / "out")
    assert again.done("plan") and not again.done("extracted")
    again.begin("extracted")
    assert set(state_of(tmp_path / "out").stages) == {"plan"}


def test_timings_that_were_removed_are_not_done(tmp_path):
    state = state_of(tmp_path / "out")
    state.open()
    state.add("latency", {})
    assert not state.done("latency")


def test_an_interrupted_fallback_to_the_dense_model_goes_on_as_that(session, quick, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Job, "_slower", lambda self, latencies, budget: "dense is faster: 0.9x")
    with monkeypatch.context() as patch:
        patch.setattr("exporter.compress.job.verify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Job(session, StagedFolder(tmp_path / "out"), REQUEST).run()
    result = Job(session, StagedFolder(tmp_path / "out"), REQUEST).run()
    assert result.shipped == "dense" and "the dense model, since dense is faster: 0.9x" in result.lines[3]
    assert result.lines[1] == "speed: that of the dense model"


def test_an_interrupted_tuning_is_finished_with_its_epochs(session, quick, tmp_path, monkeypatch):  # noqa: F811
    from moee.train import finetuning

    with monkeypatch.context() as patch:
        patch.setattr("exporter.compress.job.epochs_within", lambda *args: 2)
        stored = finetuning.store_standing

        def after_one(*args):
            stored(*args)
            raise KeyboardInterrupt

        patch.setattr(finetuning, "store_standing", after_one)
        with pytest.raises(KeyboardInterrupt):
            Job(session, StagedFolder(tmp_path / "out"), REQUEST).run()
    Job(session, StagedFolder(tmp_path / "out"), REQUEST).run()
    assert json.loads((tmp_path / "out" / "compress.json").read_text())["stages"]["tuned"]["epochs"] == 2


def test_a_refusal_leaves_an_earlier_result_alone(session, tmp_path):  # noqa: F811
    place = StagedFolder(tmp_path / "out", force=True)
    place.write({"done": True, "identity": {}, "stages": {}})
    before = place.manifest.read_text()
    session.held_out = TensorSet("unlabelled", session.held_out.images, [-1] * len(session.held_out))
    with pytest.raises(UserError, match="--max-drop cannot be checked"):
        Job(session, place, replace(REQUEST, budget=Budget(max_drop=1))).run()
    session.transform.config["crop_mode"] = "border"
    with pytest.raises(UserError, match="crop mode border"):
        Job(session, place, REQUEST).run()
    assert place.manifest.read_text() == before
    with pytest.raises(UserError, match="crop mode border"):
        Job(session, StagedFolder(tmp_path / "other"), REQUEST).run()
    assert not (tmp_path / "other").exists()


def test_the_dense_model_is_timed_where_no_candidate_could_be(session, tmp_path, monkeypatch):  # noqa: F811
    def none_faster(*args, **kwargs):
        raise OutOfReach("no MLP is faster than dense here")

    monkeypatch.setattr("moee.planning.search.Planner.recipe", none_faster)
    monkeypatch.setattr("exporter.targets.here.measure_forms", lambda *args, **kwargs: None)
    result = Job(session, StagedFolder(tmp_path / "out"), replace(REQUEST, budget=Budget(target_latency_ms=5000))).run()
    assert result.shipped == "dense" and "no candidate could be made: no MLP is faster" in result.lines[3]
    with pytest.raises(BudgetUnmet, match=r"nearest is dense .* misses latency by \d"):
        Job(session, StagedFolder(tmp_path / "two"), replace(REQUEST, budget=Budget(target_latency_ms=1e-6))).run()


def test_a_tuned_model_below_the_budgets_cosine_is_not_kept():
    def kept(cosine, accuracy):
        return {"retention": {"class_cosine": cosine, "accuracy": accuracy}}

    tuned = SimpleNamespace(info={"stages": {"extracted": kept(0.98, 0.8), "tuned": {**kept(0.95, 0.9), "best_epoch": 2}}})
    assert worth(tuned, 2, Budget(max_drop=1))["kept"]
    assert worth(tuned, 2, Budget(min_cosine=0.97)) == {"epochs": 2, "kept": False, "why": "the tuned model's cosine is 0.9500"}


@pytest.mark.parametrize(
    ("budget", "dense_ms", "falls_back"),
    [
        (Budget(min_cosine=0.9), 9.0, True), (Budget(min_cosine=0.9, target_macs=0.7), 9.0, False),
        (Budget(target_latency_ms=5), 9.0, False), (Budget(target_latency_ms=5), 4.0, True),
    ],
)  # fmt: skip
def test_the_dense_model_is_no_answer_where_it_costs_more_than_the_budget_allows(budget, dense_ms, falls_back, tmp_path):
    latencies = [{"dense_ms": {"p50": dense_ms}, "verdict": {"winner": "dense", "text": "dense is faster"}}]
    assert bool(Job(None, StagedFolder(tmp_path), REQUEST)._slower(latencies, budget)) == falls_back
