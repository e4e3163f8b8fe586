"""The planner's choice, its budgets and what it refuses."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exporter.commands.models.plan import verdict
from moee.artifacts.checkpoint import load
from moee.errors import UserError
from moee.methods import convert
from moee.models.model import ModelSpec
from moee.places.resume import fingerprint
from moee.planning.budget import COST_TOLERANCE, Budget, Point, checked_point, choose, margins, pareto, passed_over, standing
from moee.planning.forms import Latency
from moee.planning.plan import PLAN, STORE_SCHEMA, check_ways, make_plan, planned_on, read_plan
from moee.planning.search import Planner, Way, ways
from moee.stages.extract import run_extract
from moee.stages.planned import Planned
from moee.stages.session import Session
from tests.conftest import TINY, tiny_images

FAST = dict(methods=("kmeans-8", "static"), targets=(0.85, 0.7), base={"cluster_tokens": 300})


def point(method="kmeans-8", macs=0.6, cosine=0.99, drop=0.0, latency=None, params=0.8):
    return Point(method, "share", macs, params, cosine, cosine, None, drop, latency, {"method": method, "macs": macs})


@pytest.fixture
def session(monkeypatch):
    torch.manual_seed(0)
    train, held = tiny_images(40), tiny_images(24)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (train, held))
    return Session(ModelSpec(name="tiny", timm_name="vit_tiny_patch16_224", kwargs=TINY, random_seed=0), "tiny")


def test_quality_budget_takes_the_cheapest_and_cost_budget_the_most_faithful():
    points = [point(macs=0.5, cosine=0.97), point(macs=0.6, cosine=0.99), point(macs=0.7, cosine=0.995)]
    assert choose(points, Budget(min_cosine=0.98)).macs == 0.6
    assert choose(points, Budget(target_macs=0.65)).macs == 0.6
    assert choose(points, Budget(target_macs=0.72)).macs == 0.7
    assert choose(points, Budget(min_cosine=0.999)) is None
    alike = [*points, point(macs=0.604, cosine=0.995), point(macs=0.606, cosine=0.999)]
    assert choose(alike, Budget(min_cosine=0.98)).cosine == 0.995, "half a point of cost is within what routing moves"


def test_a_slower_model_with_fewer_macs_does_not_win():
    """The failure that the project exists for: fewer MACs on paper, slower on the device."""
    slow = point(macs=0.5, latency={"moee_ms": 12.0, "dense_ms": 10.0, "kind": "measured on CPU"})
    fast = point(method="static", macs=0.6, latency={"moee_ms": 8.0, "dense_ms": 10.0, "kind": "measured on CPU"})
    timing = {"moee_ms": 10.0, "dense_ms": 10.0, "kind": "measured on CPU"}
    dense = Point("dense", "", 1.0, 1.0, 1.0, 1.0, None, 0.0, timing, None)
    assert choose([slow, fast, dense], Budget(min_cosine=0.9)) is fast
    assert choose([slow, dense], Budget(min_cosine=0.9)) is dense


def test_points_are_held_against_the_dense_model_timed_beside_them():
    """Minutes apart a shared machine may be three times slower."""
    dense = Point("dense", "", 1.0, 1.0, 1.0, 1.0, None, 0.0, {"moee_ms": 80.0, "dense_ms": 80.0}, None)
    quick = point("static", latency={"moee_ms": 150.0, "dense_ms": 300.0})
    slow = point("static", macs=0.55, latency={"moee_ms": 60.0, "dense_ms": 80.0})
    assert choose([slow, quick, dense], Budget(min_cosine=0.9)) is quick
    assert margins(quick, [slow, quick], dense, Budget(min_cosine=0.9))["dense"]["latency_ms"] == pytest.approx(40.0)


def test_noise_does_not_choose_a_worse_model():
    """A busy machine's timings of two models overlap; then MACs and cosine decide."""
    def timed(speedup, noise, macs, cosine):
        latency = {"moee_ms": 10 / speedup, "dense_ms": 10.0, "speedup_range": [speedup * (1 - noise), speedup * (1 + noise)]}
        return point(macs=macs, cosine=cosine, latency=latency)

    budget, loose = Budget(min_cosine=0.97), Budget(min_cosine=0.9)
    experts, merged = timed(1.37, 0.08, 0.69, 0.9754), timed(1.28, 0.08, 0.61, 0.9765)
    assert choose([experts, merged], budget) is merged, "fewer MACs, more faithful, and not shown to be slower"
    assert passed_over(merged, [experts, merged], budget) == [experts] and passed_over(experts, [experts, merged], budget) == []
    assert passed_over(merged, [experts, merged], Budget(target_macs=0.9)) == []
    surely = [timed(1.37, 0.01, 0.69, 0.9754), timed(1.28, 0.01, 0.61, 0.9765)]
    assert choose(surely, budget) is surely[0], "on a quiet machine the time decides"
    dearer = timed(1.36, 0.08, 0.72, 0.9865)
    assert choose([experts, dearer], budget) is experts, "more MACs: its cosine is no reason"
    same = timed(1.36, 0.08, experts.macs + COST_TOLERANCE, 0.9865)
    assert choose([experts, same], budget) is same
    worse = timed(1.28, 0.08, 0.61, 0.96)
    assert choose([experts, worse], loose) is experts and choose([worse, experts, merged], loose) is merged
    slow = timed(0.99, 0.5, 0.6, 0.99)
    assert choose([experts, slow], budget) is experts, "one that is no faster than dense outdoes none"
    modelled = [point(macs=0.69, cosine=0.9754, latency={"moee_ms": 7.0, "dense_ms": 10.0}),
                point(macs=0.61, cosine=0.9765, latency={"moee_ms": 7.2, "dense_ms": 10.0})]  # fmt: skip
    assert choose(modelled, budget) is modelled[0], "a model of a device has no noise"
    stored = checked_point(json.loads(json.dumps(asdict(experts))), Path("point.json"))
    assert stored == experts and stored.noise() > 0
    broken = {**asdict(experts), "latency": {**experts.latency, "speedup_range": [0.0, 1.0]}}
    with pytest.raises(UserError, match="speedup_range"):
        checked_point(broken, Path("point.json"))


def test_ways_are_ranked_by_what_the_budget_asks():
    def timed(cosine, ms, macs=0.5):
        return point(macs=macs, cosine=cosine, latency={"moee_ms": ms, "dense_ms": 10.0})

    faithful, fast, lossy = [timed(0.999, 9.0), timed(0.99, 8.0)], [timed(0.992, 6.0)], [timed(0.5, 3.0)]
    quality = Budget(min_cosine=0.98)
    ranked = sorted((faithful, fast, lossy), key=lambda points: standing(points, quality))
    assert ranked == [fast, faithful, lossy]
    ranked = sorted((fast, lossy, faithful), key=lambda points: standing(points, Budget(target_latency_ms=9.5)))
    assert ranked == [faithful, fast, lossy]
    # whole experts leave a target of 0.7 at 0.683
    better, worse = [point(macs=0.70, cosine=0.995)], [point("moefication", macs=0.683, cosine=0.981)]
    assert standing(better, quality) < standing(worse, quality)


def test_front_holds_no_beaten_point():
    points = [point(macs=m, cosine=c) for m, c in ((0.5, 0.9), (0.6, 0.89), (0.7, 0.95), (0.7, 0.94), (1.0, 1.0))]
    assert [(p.macs, p.cosine) for p in pareto(points)] == [(0.5, 0.9), (0.7, 0.95), (1.0, 1.0)]


def test_margins_are_against_the_best_static_model_within_the_budget():
    ours, dense = point(macs=0.5), point("dense", macs=1.0, cosine=1.0)
    static = [point("static", macs=0.6), point("static", macs=0.55, cosine=0.5)]
    found = margins(ours, [ours, *static], dense, Budget(min_cosine=0.9))
    assert found["static"]["macs"] == pytest.approx(0.1)
    assert found["dense"]["macs"] == pytest.approx(0.5)
    assert margins(ours, [ours], dense, Budget(min_cosine=0.9))["static"] is None


@pytest.mark.parametrize("more", [{}, {"collages": 1, "tokens": 500}], ids=str)
def test_the_plan_is_what_extract_then_measures(session, tmp_path, more):
    options = {**FAST, "base": {**FAST["base"], **more}}
    plan = make_plan(session, Budget(target_macs=0.8), tmp_path / "plan", **options)
    assert more.items() <= plan["winner"]["recipe"]["steps"][-1].items()
    assert json.loads((tmp_path / "plan" / PLAN).read_text())["winner"] == plan["winner"]
    winner = plan["winner"]
    assert winner["method"] != "dense" and winner["macs"] <= 0.805
    assert len(plan["layers"]) == 3 and all(row["cosine_alone"] <= 1 + 1e-6 for row in plan["layers"])
    assert not (tmp_path / "plan.resume").exists()
    config = read_plan(tmp_path / "plan", session.spec)
    run_extract(session.spec, "tiny", config, tmp_path / "model", session=session, planned=planned_on(tmp_path / "plan"))
    info = load(tmp_path / "model").info
    stage = info["stages"]["extracted"]
    assert info["chosen_among"] == len(plan["points"]) - 1, "by the images that it was measured on"
    assert stage["cost"]["moee"]["macs"] / stage["cost"]["dense"]["macs"] == pytest.approx(winner["macs"], abs=1e-3)
    assert stage["retention"]["class_cosine"] == pytest.approx(winner["cosine"], abs=1e-3)


def test_moefication_takes_as_many_experts_as_the_budget_allows(session, tmp_path):
    fast = {**FAST, "methods": ("moefication",)}
    plan = make_plan(session, Budget(target_macs=0.8), tmp_path / "plan", **fast)
    config = plan["winner"]["recipe"]["steps"][-1]
    share, top_k = plan["winner"]["macs"], config["top_k"]
    assert config["method"] == "moefication" and share <= 0.8 < share + (1 - share) / (config["experts"] - top_k)
    assert len(plan["layers"]) == 3
    run_extract(session.spec, "tiny", read_plan(tmp_path / "plan", session.spec), tmp_path / "model", session=session)
    stage = load(tmp_path / "model").info["stages"]["extracted"]
    assert stage["retention"]["class_cosine"] == pytest.approx(plan["winner"]["cosine"], abs=1e-3)
    with pytest.raises(UserError, match="nothing meets the budget"):
        make_plan(session, Budget(target_macs=0.05), tmp_path / "less", **fast)


def test_clear_moe_is_planned_and_extracted_like_the_others(session, tmp_path):
    fast = {**FAST, "methods": ("clear-moe", "static")}
    plan = make_plan(session, Budget(target_macs=0.8), tmp_path / "plan", **fast)
    found = next(p for p in plan["points"] if p["method"] == "clear-moe")
    assert found["allocation"] == "ranks" and found["macs"] <= 0.8 and found["cosine"] > 0.9
    alone = make_plan(session, Budget(target_macs=0.8), tmp_path / "alone", **{**fast, "methods": ("clear-moe",)})
    assert alone["winner"] == found and len(alone["layers"]) == 3
    config = read_plan(tmp_path / "alone", session.spec)
    run_extract(session.spec, "tiny", config, tmp_path / "model", session=session)
    stage = load(tmp_path / "model").info["stages"]["extracted"]
    assert stage["cost"]["moee"]["macs"] / stage["cost"]["dense"]["macs"] == pytest.approx(found["macs"], abs=1e-6)
    assert stage["retention"]["class_cosine"] == pytest.approx(found["cosine"], abs=1e-4)


def test_a_budget_below_the_smallest_ranks_is_no_point(session, tmp_path):
    with pytest.raises(UserError, match="nothing meets the budget; nearest is dense"):
        make_plan(session, Budget(target_macs=0.05), tmp_path / "plan", **{**FAST, "methods": ("clear-moe",)})


def test_what_no_point_needs_is_not_computed(session, tmp_path, monkeypatch):
    """Sensitivity only for the allocation that asks for it, and the winner is not made a second time."""
    calls = []
    for name in ("sensitivity_of", "install_experts"):
        real = getattr(convert, name)
        monkeypatch.setattr(convert, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    make_plan(session, Budget(min_cosine=0.01), tmp_path / "share", **FAST, allocations=("share",))
    assert calls == ["install_experts"] * 4
    calls.clear()
    make_plan(session, Budget(target_macs=0.8), tmp_path / "sensitivity", **FAST, allocations=("sensitivity",))
    assert calls == ["sensitivity_of", "install_experts"] * 2


def test_criteria_of_gradients_are_each_measured(session, tmp_path):
    """In one plan or by itself, a criterion chooses the same neurons: none is given another's figures."""
    fast = {**FAST, "methods": ("static",), "targets": (0.7,)}
    both = make_plan(session, Budget(target_macs=0.7), tmp_path / "both", **fast, allocations=("sensitivity", "taylor"))
    alone = make_plan(session, Budget(target_macs=0.7), tmp_path / "alone", **fast, allocations=("taylor",))
    found = {p["allocation"]: p for p in both["points"]}
    assert found["taylor"] == {p["allocation"]: p for p in alone["points"]}["taylor"]
    assert found["taylor"]["cosine"] != found["sensitivity"]["cosine"]


def stopped(session, monkeypatch, call):
    """Interrupts the `call`-th measurement; returns what was measured, as a list that goes on growing."""
    real, seen = session.measure, []

    def stop(model, probe, message):
        seen.append(message)
        if len(seen) == call:
            raise KeyboardInterrupt
        return real(model, probe, message)

    monkeypatch.setattr(session, "measure", stop)
    return seen


def test_interrupted_plan_goes_on(session, tmp_path, monkeypatch):
    calls = stopped(session, monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        make_plan(session, Budget(min_cosine=0.5), tmp_path / "plan", **FAST)
    done = len(list((tmp_path / "plan.resume").glob("*.json"))) - 1
    assert done == 2
    before = len(calls)
    make_plan(session, Budget(min_cosine=0.5), tmp_path / "plan", **FAST)
    first = [message for message in calls[before:] if "kmeans-8, share, 0.85" in message]
    assert not first, "a finished point was measured again"


def test_interrupted_plan_of_other_options_is_refused(session, tmp_path):
    (tmp_path / "plan.resume").mkdir()
    model = {"name": session.spec.name, **session.spec.identity()}
    former = {"schema": "moee.plan-store/5", "model": model, "base": {"seed": 7}, "data": "other"}
    cases = {"5": "base.cluster_tokens None, now 300", "2": "not an interrupted plan of this version"}
    for version, said in cases.items():
        schema = f"moee.plan-store/{version}"
        (tmp_path / "plan.resume" / "identity.json").write_text(json.dumps({**former, "schema": schema}))
        with pytest.raises(UserError, match=said):
            make_plan(session, Budget(target_macs=0.8), tmp_path / "plan", **FAST)


def test_unreachable_budget_names_the_nearest(session, tmp_path):
    with pytest.raises(UserError, match="nothing meets the budget; nearest is .* it misses"):
        make_plan(session, Budget(target_macs=0.85, min_cosine=0.999999), tmp_path / "plan", **FAST)


def test_allocations_can_be_chosen(session, tmp_path):
    plan = make_plan(session, Budget(target_macs=0.8), tmp_path / "plan", **FAST, allocations=("share",))
    assert {p["allocation"] for p in plan["points"]} == {"share", ""}
    with pytest.raises(UserError, match="unknown allocation fair; expected some of share, sensitivity"):
        make_plan(session, Budget(target_macs=0.8), tmp_path / "other", **FAST, allocations=("fair",))


def test_accuracy_budget_needs_labels(session, tmp_path):
    session.held_out.classes = ()
    with pytest.raises(UserError, match="--max-drop cannot be checked: tiny has no labels of .*; use --min-cosine"):
        make_plan(session, Budget(max_drop=1), tmp_path / "plan", **FAST)


def test_plan_of_another_model_is_refused(session, tmp_path):
    make_plan(session, Budget(target_macs=0.8), tmp_path / "plan", **FAST)
    other = ModelSpec(name="deit", timm_name="deit_tiny_patch16_224")
    with pytest.raises(UserError, match="was made for tiny with timm_name"):
        read_plan(tmp_path / "plan", other)


def test_images_that_changed_since_the_plan_are_said(session, caplog):
    """Its winner holds for the images of then, and looks too good on the held-out ones that it was chosen by."""
    images = {"train": fingerprint(session.train), "val": fingerprint(session.held_out)}
    planned = Planned("tiny", images, 7)
    assert planned.among(session) == 7 and not caplog.text
    assert planned.among(SimpleNamespace(**{**vars(session), "source": "moved"})) == 7 and not caplog.text, "a folder was moved"
    session.train = tiny_images(41)
    assert planned.among(session) == 7
    assert "made on the images of tiny, which have changed since: another method may win" in caplog.text
    session.held_out, session.source = tiny_images(25), "other"
    assert planned.among(session) == 0 and "of tiny, and not on those of other: another method may win" in caplog.text


def test_a_plan_needs_a_budget():
    from moee.config import validated

    with pytest.raises(UserError, match="a plan needs a budget"):
        validated(Budget, {})


def test_a_drop_is_in_percentage_points_as_in_verify():
    lossy = point(drop=0.02)
    assert choose([lossy], Budget(max_drop=2)) is lossy
    assert lossy.shortfalls(Budget(max_drop=0.5)) == {"accuracy": pytest.approx(0.015)}


def test_points_timed_in_another_way_are_not_taken_over(session, tmp_path):
    """An interrupted plan for one device must not lend its milliseconds to another."""
    def planner(label, ms):
        timing = Latency(label, lambda model: {"kind": "modelled", "dense_ms": 2 * ms, "moee_ms": ms})
        return Planner(session, Budget(min_cosine=0.5), {"cluster_tokens": 300}, tmp_path, timing, report=lambda *a: None)

    assert planner("a", 1.0).point(Way("static", "share"), 0.8).latency["moee_ms"] == 1.0
    assert planner("b", 3.0).point(Way("static", "share"), 0.8).latency["moee_ms"] == 3.0
    assert planner("a", 9.0).point(Way("static", "share"), 0.8).latency["moee_ms"] == 1.0


def test_a_point_that_was_not_timed_for_its_quality_is_timed_under_a_wider_budget(session, tmp_path):
    """Else it would be chosen by its MACs among others that are chosen by their time."""
    def planner(least):
        timing = Latency("a", lambda model: {"kind": "modelled", "dense_ms": 2.0, "moee_ms": 1.0})
        made = Planner(session, Budget(min_cosine=least), {}, tmp_path, timing, report=lambda *a: None)
        made.frugal = True
        return made

    way = Way("static", "share")
    strict, again, wide = (planner(least).point(way, 0.8) for least in (1.0, 1.0, 0.1))
    assert strict == again and strict.latency is None and wide.latency["moee_ms"] == 1.0
    assert planner(1.0).point(way, 0.8) == wide


def test_bad_data_is_not_taken_for_a_budget_out_of_reach(session, tmp_path):
    with torch.no_grad():
        session.dense.blocks[1].norm2.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="receives NaN"):
        make_plan(session, Budget(target_macs=0.8), tmp_path / "plan", **FAST)


def test_a_damaged_point_is_one_sentence(session, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupted(session, tmp_path)
    stored = next(p for p in (tmp_path / "plan.resume").glob("*.json") if p.name != "identity.json")
    stored.write_text('{"method": 3}')
    with pytest.raises(UserError):
        make_plan(session, Budget(min_cosine=0.5), tmp_path / "plan", **FAST)


@pytest.mark.parametrize("change", [{"method": "x"}, {"allocation": "x"}, {"recipe": {"steps": "x"}}, {"recipe": None}])
def test_a_point_of_other_options_is_one_sentence(session, tmp_path, change):
    with pytest.raises(KeyboardInterrupt):
        interrupted(session, tmp_path)
    stored = next(p for p in (tmp_path / "plan.resume").glob("*.json") if p.name != "identity.json")
    stored.write_text(json.dumps({**json.loads(stored.read_text()), **change}))
    with pytest.raises(UserError, match="holds a point of other options"):
        make_plan(session, Budget(min_cosine=0.5), tmp_path / "plan", **FAST)


def interrupted(session, tmp_path):
    real = session.measure

    def stop(model, probe, message):
        if "0.70" in message:
            raise KeyboardInterrupt
        return real(model, probe, message)

    session.measure = stop
    try:
        make_plan(session, Budget(min_cosine=0.5), tmp_path / "plan", **FAST)
    finally:
        session.measure = real


def test_a_plan_of_other_options_is_refused_before_the_work(session, tmp_path, monkeypatch):
    (tmp_path / "plan.resume").mkdir()
    model = {"name": session.spec.name, **session.spec.identity()}
    former = {"schema": STORE_SCHEMA, "model": model, "base": {"seed": 7}, "data": "other"}
    (tmp_path / "plan.resume" / "identity.json").write_text(json.dumps(former))
    monkeypatch.setattr(Session, "prove", lambda *_: pytest.fail("the model was tried before the refusal"))
    monkeypatch.setattr("moee.planning.plan.fingerprints", lambda *_: pytest.fail("images were read before the refusal"))
    with pytest.raises(UserError, match="base.cluster_tokens None, now 300"):
        make_plan(session, Budget(target_macs=0.8), tmp_path / "plan", **FAST)


def test_a_method_that_cuts_the_heads_itself_is_tried_without_narrower_ones():
    wanted = ways(("static", "corp"), ("sensitivity",), (1.0, 0.75))
    assert [(way.method, way.attention) for way in wanted] == [("static", 1.0), ("corp", 1.0), ("static", 0.75)]
    check_ways(("static",), ("sensitivity",), (1.0, 0.75), {})
    check_ways(("corp", "static"), ("sensitivity",), (1.0, 0.75), {})
    with pytest.raises(UserError, match="corp cuts the heads itself"):
        check_ways(("corp",), ("sensitivity",), (0.75,), {})


def test_lowrank_is_planned_like_the_others_and_what_cannot_cut_the_model_is_left_out(session, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise UserError("corp: no attention; give another")

    monkeypatch.setattr("moee.methods.corp.method.CorpMethod.check", refuse)
    fast = {**FAST, "targets": (0.7,)}
    plan = make_plan(session, Budget(target_macs=0.8), tmp_path / "plan", **{**fast, "methods": ("lowrank", "corp")})
    assert {p["method"] for p in plan["points"]} == {"lowrank", "dense"}
    assert "corp is not tried: corp: no attention" in caplog.text
    assert plan["winner"]["macs"] <= 0.8 and plan["winner"]["method"] == "lowrank"
    with pytest.raises(UserError, match="corp: no attention"):
        make_plan(session, Budget(target_macs=0.8), tmp_path / "alone", **{**fast, "methods": ("corp",)})


def test_what_could_not_be_made_is_named_with_the_reason_and_after_an_interruption_too(session, tmp_path):
    options = dict(methods=("clear-moe",), targets=(0.3,), base={"tokens": 400})
    with pytest.raises(UserError, match="nothing meets the budget"):  # the points are kept
        make_plan(session, Budget(target_params=0.01), tmp_path / "plan", **options)
    plan = make_plan(session, Budget(min_cosine=0.1), tmp_path / "plan", **options)
    assert [(f["method"], f["target"]) for f in plan["not_made"]] == [("clear-moe", 0.3)]
    (line,) = [text for text in verdict(plan) if text.startswith("clear-moe")]
    assert line.startswith("clear-moe (ranks) could not be made at 30.00% of the MACs: ") and "earlier run" not in line
