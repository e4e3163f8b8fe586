"""Models with narrower heads: what every method and a plan make of them, what an artifact remembers and refuses."""

import copy
import importlib

import pytest
import torch

from exporter.cli import main
from moee.artifacts import checkpoint
from moee.config import FinetuneConfig
from moee.errors import UserError
from moee.methods.recipe import make_recipe, read_recipe
from moee.mlps.attention import narrow_attentions
from moee.models.model import build_model
from moee.planning.budget import Budget
from moee.planning.plan import PLAN, make_plan, read_plan
from moee.stages.extract import run_extract
from moee.stages.session import Session
from moee.train.finetuning import finetune
from tests.conftest import tiny_images, tiny_spec
from tests.moee.test_checkpoint_and_finetune import rewrite
from tests.moee.test_planning import stopped


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (tiny_images(24), tiny_images(24)))
    return Session(tiny_spec(), "tiny")


@pytest.mark.parametrize(
    "method, values",
    [
        ("experts", {"clustering": "kmeans", "clusters": 4, "cluster_tokens": 200, "target_macs": 0.7}),
        ("moefication", {"experts": 4, "top_k": 2}),
        ("clear-moe", {"experts": 2, "target_macs": 0.7, "calibration_images": 20}),
    ],
    ids=["moee", "moefication", "clear-moe"],
)
def test_every_method_starts_from_the_narrowed_model(session, tmp_path, method, values):
    recipe = make_recipe(method, values={**values, "attention_macs": 0.8})
    moee = run_extract(tiny_spec(), "tiny", recipe, tmp_path / "out", session=session)
    assert moee.recipe == recipe and len(recipe.steps) == 2
    assert narrow_attentions(moee.model) and not narrow_attentions(session.dense)
    cost = moee.info["stages"]["extracted"]["cost"]
    if "target_macs" in values:
        bound = 1.005 if method == "clear-moe" else 1.02  # held-out images route a little differently
        assert 0.6 * cost["dense"]["macs"] < cost["moee"]["macs"] <= bound * values["target_macs"] * cost["dense"]["macs"]
    again = checkpoint.load(tmp_path / "out")
    images = tiny_images(4).images
    with torch.no_grad():
        assert torch.equal(again.model(images), moee.model(images))
    assert not narrow_attentions(again.dense())


def test_a_plan_narrows_every_method_alike(session, tmp_path):
    """Rivals get the narrowed model too, and the plan's configuration makes it again."""
    base = {"cluster_tokens": 200, "tokens": 400, "refit_tokens": 400}
    methods = ("kmeans-8", "static", "moefication", "clear-moe")
    budget = Budget(target_macs=0.75)
    plan = make_plan(session, budget, tmp_path / "plan", methods=methods, base=base, allocations=("share",), attention=(0.8,))
    recipes = [p["recipe"] for p in plan["points"] if p["recipe"]]
    assert len(recipes) >= 3 and all(r["steps"][0]["attention_macs"] == 0.8 and len(r["steps"]) == 2 for r in recipes)
    assert all(p["macs"] <= 0.76 and p["attention"] == 0.8 for p in plan["points"] if p["recipe"])
    assert read_recipe(tmp_path / "plan" / "recipe.toml") == read_plan(tmp_path / "plan", tiny_spec())
    config = read_plan(tmp_path / "plan", tiny_spec())
    moee = run_extract(tiny_spec(), "tiny", config, tmp_path / "out", session=session)
    assert narrow_attentions(moee.model)
    made = moee.info["stages"]["extracted"]["retention"]["class_cosine"]
    assert made == pytest.approx(plan["winner"]["cosine"], abs=1e-6)


@pytest.mark.slow
def test_a_plan_tries_shares_of_the_attention(session, tmp_path, monkeypatch):
    """Whole and narrower attention in one front, the widths of every share from one measurement, one calibration a share; a plan
    broken off between two shares ends the same."""
    calls = []
    for place, name in (("moee.methods.heads.narrowing", "width_losses"), ("moee.planning.search", "calibrate")):
        real = getattr(importlib.import_module(place), name)
        monkeypatch.setattr(f"{place}.{name}", lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    options = {
        "methods": ("kmeans-8", "static"), "targets": (0.85, 0.7), "allocations": ("share",), "attention": (1.0, 0.8, 0.6),
        "base": {"cluster_tokens": 200, "tokens": 400, "refit_tokens": 400},
    }  # fmt: skip
    plan = make_plan(session, Budget(min_cosine=0.5), tmp_path / "plan", **options)
    # refinement may turn back to the share of a leader
    assert calls[:4] == ["calibrate", "width_losses", "calibrate", "calibrate"] and calls.count("width_losses") == 1
    shares = [p["attention"] for p in plan["points"] if p["recipe"]]
    assert all(shares.count(s) >= 2 for s in (1.0, 0.8, 0.6))
    config = read_plan(tmp_path / "plan", tiny_spec())
    moee = run_extract(tiny_spec(), "tiny", config, tmp_path / "out", session=session)
    made = moee.info["stages"]["extracted"]
    assert made["retention"]["class_cosine"] == pytest.approx(plan["winner"]["cosine"], abs=1e-6)
    assert made["cost"]["moee"]["macs"] / made["cost"]["dense"]["macs"] == pytest.approx(plan["winner"]["macs"], abs=1e-6)

    seen = stopped(session, monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        make_plan(session, Budget(min_cosine=0.5), tmp_path / "again", **options)
    assert "attention 0.8" in seen[-1]
    make_plan(session, Budget(min_cosine=0.5), tmp_path / "again", **options)
    assert (tmp_path / "again" / PLAN).read_bytes() == (tmp_path / "plan" / PLAN).read_bytes()
    assert seen.count(seen[0]) == 1, "a finished point was measured again"


@pytest.fixture
def artifact(session, tmp_path):
    config = make_recipe(values={"clustering": "kmeans", "clusters": 4, "cluster_tokens": 200, "attention_macs": 0.8})
    run_extract(tiny_spec(), "tiny", config, tmp_path / "out", session=session)
    return tmp_path / "out"


def _wider(manifest, state):
    manifest["attention"][0]["qk"] = 24


def _elsewhere(manifest, state):
    manifest["attention"][0]["name"] = "blocks.0.mlp"


def _twice(manifest, state):
    manifest["attention"].append(manifest["attention"][0])


def _other_width(manifest, state):
    manifest["attention"][0] |= {"qk": 12, "v": 12}


def _below_half(manifest, state):
    manifest["attention"][0] |= {"qk": 4, "v": 4}


def _text(manifest, state):
    manifest["attention"][0]["qk"] = str(manifest["attention"][0]["qk"])


def _huge(manifest, state):
    manifest["attention"][0]["qk"] = 10**400


def _no_list(manifest, state):
    manifest["attention"] = {"blocks.0.attn": 8}


def _no_query(manifest, state):
    del state[manifest["attention"][0]["name"] + ".q.weight"]


def _half(manifest, state):
    name = manifest["attention"][0]["name"] + ".v.weight"
    state[name] = state[name].half()


@pytest.mark.parametrize(
    "change", [_wider, _elsewhere, _twice, _other_width, _below_half, _text, _huge, _no_list, _no_query, _half]
)
def test_damaged_records_are_refused(artifact, change):
    rewrite(artifact, change)
    with pytest.raises(UserError):
        checkpoint.load(artifact)


@pytest.mark.parametrize("name", ["", "patch_embed", "blocks.0", "blocks.0.mlp", "blocks.0.attn.qkv", "blocks.2.attn"])
def test_a_record_excuses_no_other_tensor(artifact, name, monkeypatch):
    """A manifest that asks for a wide model, with names under `attention` that would hide missing tensors: refused before the
    model takes memory."""

    def change(manifest, state):
        manifest["model"]["kwargs"]["embed_dim"] = 4096
        manifest["attention"] = [{"name": name, "qk": 1024, "v": 1024}]
        for key in [k for k in state if k.startswith(name)]:
            del state[key]

    rewrite(artifact, change)
    whole = []
    monkeypatch.setattr(checkpoint, "build_model", lambda spec: whole.append(torch.empty(0).device.type) or build_model(spec))
    with pytest.raises(UserError):
        checkpoint.load(artifact)
    assert set(whole) <= {"meta"}


def test_training_experts_trains_the_narrowed_attention(artifact, tiny_model):
    moee = checkpoint.load(artifact)
    name = next(iter(narrow_attentions(moee.model)))
    with torch.no_grad():  # the closed form leaves little to gain
        moee.model.get_submodule(name).proj.weight.mul_(-1)
    before = copy.deepcopy(moee.model)
    config = FinetuneConfig(epochs=4, lr=5e-6, train="experts", distil="tokens", validation=0.3)
    result = finetune(moee.model, moee.dense(), tiny_images(24), config)
    assert result.best_epoch > 0 and result.validation_loss[result.best_epoch] < result.validation_loss[0]
    changed = {n for n, p in moee.model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert f"{name}.q.weight" in changed and f"{name}.proj.bias" in changed
    assert all("mlp" in n or "attn" in n for n in changed)


def test_bad_options_end_with_one_sentence(capsys):
    given = ["extract", "dinov2-s", "--data", "digits", "--attention-macs", "1.2", "--out", "nowhere"]
    assert main(given) == 2
    assert "--attention-macs" in capsys.readouterr().err


def test_start_depends_on_what_was_seen(session):
    plain, collages = (session.start(make_recipe(values={"attention_macs": 0.8, "collages": n})) for n in (0, 1))
    assert plain is not collages and session.start(make_recipe("static", values={"attention_macs": 0.8})) is plain
    assert session.start(make_recipe()) is session.dense
    same = all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), collages.state_dict().values(), strict=True))
    assert not same


def test_a_plan_says_what_is_wrong_before_it_starts(session, tmp_path):
    for share, words in ((0.3, "0.50 or more"), (1.5, "--attention-macs")):
        with pytest.raises(UserError, match=words):
            make_plan(session, Budget(min_cosine=0.5), tmp_path / "plan", methods=("static",), attention=(1.0, share))
        assert not (tmp_path / "plan.resume").exists()
    with pytest.raises(UserError, match="nearest is dense .* narrower attention or merged tokens alone leave 0.8"):
        budget, base = Budget(target_macs=0.95), {"cluster_tokens": 200, "tokens": 400}
        make_plan(session, budget, tmp_path / "plan", methods=("static",), base=base, attention=(0.5,))
    with pytest.raises(ValueError, match="go into `attention`"):
        make_plan(session, Budget(min_cosine=0.5), tmp_path / "plan", methods=("static",), base={"attention_macs": 0.8})
