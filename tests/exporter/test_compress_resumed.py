"""What a compression goes on from: stages that were removed or interrupted by hand, and refusals that leave the place alone."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from exporter.compression import job
from exporter.compression.job import Job
from exporter.compression.request import Request
from exporter.compression.state import TIMINGS, State
from exporter.compression.tuning import worth
from exporter.compression.verdicts import slower
from exporter.report import collect
from moee.data.image_set import TensorSet
from moee.errors import BudgetUnmet, OutOfReach, UserError
from moee.places.resume import alike
from moee.places.staged_folder import StagedFolder
from moee.planning.budget import Budget
from moee.stages.identity import model_identity
from moee.stages.opened import session_of
from moee.stages.planned import Planned
from tests.exporter.test_compress import FAST, interrupted, quick, session  # noqa: F401

REQUEST = Request(Budget(min_cosine=0.9), time_s=None, **FAST)


def state_of(out):
    return State(StagedFolder(out), {"a": 1})


def made(out, stage, text="{}"):
    """The manifest of a stage, as if the stage had written it."""
    file = out / stage / StagedFolder.folders[stage].manifest
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


def test_a_stage_that_is_made_anew_takes_those_made_of_it_along(tmp_path):
    state = state_of(tmp_path / "out")
    state.open()
    for stage in ("plan", "extracted", "tuned", "export"):
        made(tmp_path / "out", stage)
        state.add(stage, {"epochs": 1, "kept": True, "why": ""} if stage == "tuned" else {})
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


@pytest.mark.slow
def test_an_interrupted_fallback_to_the_dense_model_goes_on_as_that(session, quick, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(job, "slower", lambda *args: "the timing at the end says: dense is faster: 0.9x")
    with monkeypatch.context() as patch:
        patch.setattr("exporter.compression.job.verify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Job(session, StagedFolder(tmp_path / "out"), REQUEST).run()
    result = Job(session, StagedFolder(tmp_path / "out"), REQUEST).run()
    assert result.shipped == "dense"
    assert "the dense model, since the timing at the end says: dense is faster: 0.9x" in result.lines[3]
    assert result.lines[1] == "speed: that of the dense model"


@pytest.mark.slow
def test_a_report_of_a_shipped_dense_model_has_no_figures_of_the_cut_one(session, quick, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(job, "slower", lambda *args: "the timing at the end says: dense is faster: 0.9x")
    assert Job(session, StagedFolder(tmp_path / "out"), REQUEST).run().shipped == "dense"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "no model found" in page and ">passed<" in page
    assert "here the dense one ships" in page and "moee plots MODEL" not in page
    sources = collect([tmp_path / "out"])
    assert set(sources.artifacts) == {"moee.model", "moee.latency", "moee.plan"}, "the cut model's own"
    for file in ("export/export.json", "verify/parity.json"):
        assert any(f"{file} is of another model: not shown" in problem for problem in sources.problems)


def test_an_interrupted_tuning_is_finished_with_its_epochs(session, quick, tmp_path, monkeypatch):  # noqa: F811
    from moee.train import finetuning

    with monkeypatch.context() as patch:
        patch.setattr("exporter.compression.job.epochs_within", lambda *args: 2)
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


@pytest.mark.slow
def test_the_dense_model_is_timed_where_no_candidate_could_be(session, tmp_path, monkeypatch):  # noqa: F811
    def none_faster(*args, **kwargs):
        raise OutOfReach("no MLP is faster than dense here")

    monkeypatch.setattr("moee.planning.search.Planner.recipe", none_faster)
    monkeypatch.setattr("exporter.targets.here.measure_forms", lambda *args, **kwargs: None)
    result = Job(session, StagedFolder(tmp_path / "out"), replace(REQUEST, budget=Budget(target_latency_ms=5000))).run()
    assert result.shipped == "dense" and "no candidate could be made: no MLP is faster" in result.lines[3]
    with pytest.raises(BudgetUnmet, match=r"nearest is dense .* misses latency by [\d.]+ ms") as unmet:
        Job(session, StagedFolder(tmp_path / "two"), replace(REQUEST, budget=Budget(target_latency_ms=1e-6))).run()
    assert not getattr(unmet.value, "__notes__", []), "the same command would end alike"


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
def test_the_dense_model_is_no_answer_where_it_costs_more_than_the_budget_allows(budget, dense_ms, falls_back):
    latencies = [{"dense_ms": {"p50": dense_ms}, "verdict": {"winner": "dense", "text": "dense is faster"}}]
    assert bool(slower(latencies, budget, "cpu")) == falls_back
    assert not slower(latencies, budget, "orin-agx"), "what is timed here says nothing of a board"
    for ratio, ships in ((1.003, False), (1.019, False), (1.021, True)):
        planned = {"dense_ms": dense_ms, "moee_ms": dense_ms / ratio, "device": "orin-agx", "kind": "modelled"}
        said = slower(latencies, budget, "orin-agx", planned)
        assert bool(said) == (falls_back and not ships)
        assert not said or said == f"on orin-agx (modelled) it is {ratio:.3f}x as fast, and a gain below 2% is none"


@pytest.mark.parametrize("stage", ["plan", "extracted", "export", "latency"])
def test_what_came_in_the_place_of_a_stage_meanwhile_is_not_gone_on_from(stage, tmp_path):
    state = state_of(tmp_path / "out")
    state.open()
    if stage == "latency":
        files = [tmp_path / "out" / name for name in TIMINGS]
        files[0].parent.mkdir()
        for file in files:
            file.write_text("{}")
        changed = files[1]
    else:
        changed = made(tmp_path / "out", stage)
    state.add(stage, {})
    state_of(tmp_path / "out")
    changed.write_text('{"mine": 1}')
    with pytest.raises(UserError, match=f"{changed} is not what this compression made; put that back, or remove"):
        state_of(tmp_path / "out")
    changed.unlink()
    assert not state_of(tmp_path / "out").done(stage), "it is made anew"


def test_a_model_whose_code_changed_is_not_gone_on_with(session, tmp_path):  # noqa: F811
    """Its weights are the same: nothing but what it answers tells that a trial of it says nothing of it now."""
    own = session_of(session.dense, (session.train.images, torch.tensor(session.train.labels)))

    def state():
        place = StagedFolder(tmp_path / "out")
        return State(place, Job(own, place, REQUEST)._identity(REQUEST.budget))

    state().open()
    answers = model_identity(own)["answers"]
    assert len(answers) == 2 and state().stages == {}
    planned = Planned("given", answers=[[value * (1 + 1e-5) for value in row] for row in answers])
    planned.check(own)
    assert alike([], answers) and not alike(answers, answers[:1]) and not alike(["x"], answers)
    act, own.dense.blocks[0].mlp.act = own.dense.blocks[0].mlp.act, torch.nn.ReLU()
    try:
        with pytest.raises(UserError, match=r"a compression with model\.answers 'those of then', now 'others, so its code"):
            state()
        with pytest.raises(UserError, match="when it gave other outputs: its code, or an attribute that it reads, has changed"):
            planned.check(own)
    finally:
        own.dense.blocks[0].mlp.act = act


@pytest.mark.parametrize(
    "damage",
    [
        {"stages": {"plan": 1}}, {"stages": {"tuned": {}}}, {"stages": {"unshipped": {"why": 5}}},
        {"stages": {"tuning": {"epochs": 0}}}, {"identity": None}, {"schema": "moee.compress/2"},
    ],
)  # fmt: skip
def test_a_damaged_state_is_one_sentence(damage, tmp_path):
    state_of(tmp_path / "out").open()
    file = tmp_path / "out" / "compress.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    with pytest.raises(UserError, match=r"compress\.json.*; choose another --out or pass --force to begin anew"):
        state_of(tmp_path / "out")


def test_files_of_the_users_own_in_the_folder_are_never_replaced(tmp_path):
    state_of(tmp_path / "out").open()
    assert StagedFolder.files
    for name in StagedFolder.files:
        file = tmp_path / "out" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"mine": 1}')
        for force in (False, True):
            place = StagedFolder(tmp_path / "out", force=force)
            with pytest.raises(UserError, match=f"{file} is not .*; move it away, or choose another place"):
                place.check()
            with pytest.raises(UserError, match="move it away"):
                place.clear()
        assert file.read_text() == '{"mine": 1}'
        file.unlink()


def test_a_module_in_python_is_tuned_and_the_report_is_of_what_ships(session, quick, tmp_path, monkeypatch):  # noqa: F811
    """Nothing but the module itself opens the artifact for the tuning; a tuned model that is not kept leaves no trace."""
    monkeypatch.setattr("exporter.compression.job.epochs_within", lambda *args: 1)
    monkeypatch.setattr("exporter.compression.job.worth", lambda *args: {"epochs": 1, "kept": False, "why": "it holds less"})
    own = session_of(session.dense, (session.train.images, torch.tensor(session.train.labels)))
    place = StagedFolder(tmp_path / "out")
    result = Job(own, place, REQUEST, word=session.dense).run()
    assert result.stages["tuned"]["epochs"] == 1 and "it holds less" in result.lines[3]
    assert not (tmp_path / "out" / "tuned").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "of another model: not shown" not in page
