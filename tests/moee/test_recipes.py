"""Recipes: from a file or flags to steps and back, and what is refused with its line."""

import os

import pytest

from moee.config import FinetuneConfig
from moee.errors import UserError
from moee.methods.experts import ExpertsOptions
from moee.methods.heads.method import HeadsOptions
from moee.methods.idle import refuse_idle_options
from moee.methods.recipe import Recipe, make_recipe, read_recipe, read_recipe_json
from moee.methods.registry import METHODS, method_named
from moee.methods.static import StaticOptions
from moee.migrations import recipe_of
from moee.planning.plan import read_plan
from moee.store.artifact import write_manifest
from tests.conftest import tiny_spec

HEADS = '[[step]]\nmethod = "heads"\nattention_macs = 0.8\n'
HALF = """seed = 3

[[step]]
method = "heads"
attention_macs = 0.75

[[step]]  # the MLPs
method = 'static'
target_macs = 0.5

[tune]
epochs = 5
"""


HEADS_OPTIONS = HeadsOptions(attention_macs=0.8)


def written(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_a_file_is_read_and_written_again(tmp_path):
    recipe = read_recipe(written(tmp_path, HALF))
    assert recipe.steps == (HeadsOptions(attention_macs=0.75, seed=3), StaticOptions(target_macs=0.5, seed=3))
    assert recipe.tune == FinetuneConfig(epochs=5) and recipe.seed == 3 and recipe.method.name == "static"
    assert read_recipe(written(tmp_path, recipe.to_toml())) == recipe
    assert read_recipe_json(recipe.to_json(), "x") == recipe


@pytest.mark.parametrize("method", [m for m in METHODS if m.cuts == "mlps"], ids=lambda m: m.name)
def test_every_option_of_every_method_survives_the_file(tmp_path, method):
    """Each at a value that is not its default, as far as one alone fits."""
    needed = {"experts": 5} if method.name == "moefication" else {}
    values = {"seed": 7, "exclude": ("a b", 'c"d')}
    recipe = make_recipe(method.name, values={**needed, **values})
    assert read_recipe(written(tmp_path, recipe.to_toml())) == recipe
    for name, field in method.options.model_fields.items():
        for value in (0.25, 3, "random", "mean", "model", True, False, ("x",)):
            try:
                one = make_recipe(method.name, values={**needed, name: value})
            except UserError:
                continue
            assert read_recipe(written(tmp_path, one.to_toml())) == one, (name, value, field)


@pytest.mark.parametrize(
    "old, new, line, said",
    [
        ('method = "heads"', 'method = "head"', 4, "unknown method 'head'; expected one of experts, static"),
        ("target_macs = 0.5", "target_mac = 0.5", 9, "target_mac is no option of method static; expected some of"),
        ("target_macs = 0.5", "clusters = 4", 9, "clusters is for method experts, and not for static"),
        ("target_macs = 0.5", "target_macs = 5", 9, "target_macs: expected a share above 0 and below 1, such as 0.9 (came 5)"),
        ("target_macs = 0.5", "target_macs = 'half'", 9, "expected a number above 0 and below 1, such as 0.9 (came 'half')"),
        ("target_macs = 0.5", "allocation = 'model'", 7, "it needs criterion sensitivity"),
        ("seed = 3", "seed = -1", 1, "seed: expected a whole number from 0 to 4294967295"),
        ("seed = 3", "speed = 3", 1, "unknown 'speed'; expected seed, [[step]] or [tune]"),
        ("'static'", "7", 8, "a step needs its method, one of experts"),
        ("epochs = 5", "epochs = 0", 12, "epochs: expected a whole number from 1 to"),
        ("epochs = 5", "epoch = 5", 12, "epoch"),
        ("[tune]", "[tuned]", 11, "unknown 'tuned'"),
    ],
)
def test_what_does_not_fit_is_named_with_its_line(tmp_path, old, new, line, said):
    with pytest.raises(UserError) as refusal:
        read_recipe(written(tmp_path, HALF.replace(old, new)))
    assert f"recipe.toml, line {line}: " in str(refusal.value) and said in str(refusal.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "no step that cuts MLPs or merges tokens; expected one of experts"),
        ('[[step]]\nmethod = "heads"\nattention_macs = 0.8\n', "no step that cuts MLPs"),
        ('[[step]]\nmethod = "static"\n' + HEADS, "heads after static: expected the attention, then the tokens, then MLPs"),
        ('[[step]]\nmethod = "heads"\n[[step]]\nmethod = "static"\n', "line 1: narrower heads need attention_macs"),
        ('[[step]]\nmethod = "static"\nkeep = true\n', "line 3: keep: expected a share above 0 and at most 1"),
        ('[[step]]\nmethod = "static"\nkeep = "0.5"\n', "line 3: keep: expected a number above 0 and at most 1"),
        ('[[step]]\nmethod = "static"\nexclude = "blocks.0"\n', "line 3: exclude: expected a list"),
        ('[[step]]\nmethod = "static"\ntarget-macs = 0.5\n', "line 3: 'target-macs' is written target_macs"),
        ('[[step]]\nmethod = "static"\n[tune]\nbatch-size = 3\n', "line 4: 'batch-size' is written batch_size"),
        ('[[step]]\nmethod = "static"\n[tune]\nbatch = 3\n', "line 4: batch is no option of the tuning; expected some of seed"),
        ('[[step]]\nmethod = "static"\n[[step]]\nmethod = "experts"\n', "line 4: experts after static: both cut MLPs"),
        (HEADS * 2 + '[[step]]\nmethod = "static"\n', "line 5: heads comes twice"),
        ('step = "static"', "line 1: expected steps as [[step]]"),
        ('[[step]]\nmethod = "static"\ntune = 3\n', "line 3: tune is no option"),
        ('tune = 3\n[[step]]\nmethod = "static"\n', "tune"),
        ("[[step]\n", "is no TOML"),
    ],
)
def test_other_files_are_one_sentence(tmp_path, text, said):
    with pytest.raises(UserError) as refusal:
        read_recipe(written(tmp_path, text))
    assert said in str(refusal.value), str(refusal.value)


def test_no_file_at_all(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_recipe(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no TOML"):
        read_recipe(tmp_path / "bytes")


def test_a_step_that_changes_nothing_is_left_out(tmp_path):
    whole = HEADS.replace("0.8", "1") + '[[step]]\nmethod = "static"\n'
    assert read_recipe(written(tmp_path, whole)) == make_recipe("static", values={"keep": 0.95, "width_multiple": 1})


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    (tmp_path / "bom.toml").write_text(HALF, encoding="utf-8-sig")
    assert read_recipe(tmp_path / "bom.toml") == read_recipe(written(tmp_path, HALF))


def test_an_option_that_no_step_takes_is_refused():
    """Collages are for heads too, but no heads are asked for."""
    said = "--collages is for method experts, static, moefication, corp or heads, and not for clear-moe"
    with pytest.raises(UserError, match=said):
        make_recipe("clear-moe", values={"collages": 3})
    both = make_recipe("clear-moe", values={"collages": 3, "attention_macs": 0.8})
    assert both.first == (HeadsOptions(attention_macs=0.8, collages=3),)


def test_no_device_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match="no ordinary file"):
            read_recipe(path)


def test_older_names_mean_what_they_say():
    assert make_recipe("moee") == make_recipe("experts") == make_recipe(preset="deploy") == make_recipe()
    assert make_recipe("static") == make_recipe(preset="static") == make_recipe(values={"clustering": "none"})
    assert (make_recipe("static").cut.target_macs, make_recipe("static").cut.mlp_floor) == (0.7, 0.5)
    assert make_recipe("static", values={"keep": 0.9}).cut.target_macs is None
    assert make_recipe(values={"clustering": "none", "target_macs": 0.6}).cut.mlp_floor is None
    assert make_recipe(values={"clusters": 8}).cut.clustering == "kmeans"
    paper = make_recipe(preset="paper", values={"clustering": "none"}).cut
    assert isinstance(paper, StaticOptions) and paper.criterion == "variance" and paper.keep == 0.8
    none = {"clustering": "none"}
    for bad in (dict(method="heads"), dict(method="static", preset="paper"), dict(method="moefication", values=none)):
        with pytest.raises(UserError, match="leave|give"):
            make_recipe(**bad)


def test_what_is_given_replaces_what_the_default_preset_says():
    """A kept share and a budget say the same thing; a number of clusters is of some clusterings."""
    plain, usual = make_recipe(preset="compensated").cut, make_recipe().cut
    assert plain == ExpertsOptions() and (plain.clustering, plain.keep, plain.target_macs) == ("hdbscan", 0.95, None)
    assert usual.target_macs is not None and usual.mlp_floor is not None and usual.clusters is not None
    keep = make_recipe(values={"keep": 0.9}).cut
    assert (keep.keep, keep.target_macs, keep.mlp_floor, keep.clusters) == (0.9, None, None, usual.clusters)
    target = make_recipe("experts", values={"target_macs": 0.5}).cut
    assert (target.target_macs, target.mlp_floor, target.clusters) == (0.5, None, usual.clusters)
    dense = make_recipe(values={"clustering": "hdbscan"}).cut
    assert (dense.clustering, dense.clusters, dense.components, dense.target_macs) == ("hdbscan", None, None, usual.target_macs)
    both = make_recipe(values={"clusters": 5, "keep": 0.9, "seed": 3, "attention_macs": 0.8})
    assert (both.cut.clusters, both.cut.keep, both.cut.seed, both.first[0].seed) == (5, 0.9, 3, 3)
    paper = make_recipe(preset="paper", values={"target_macs": 0.6}).cut
    assert (paper.target_macs, paper.criterion, paper.clustering) == (0.6, "variance", "hdbscan")


def test_steps_in_another_order_cannot_be_made():
    for steps in ((StaticOptions(), HEADS_OPTIONS), (StaticOptions(), ExpertsOptions()), (HEADS_OPTIONS,), ()):
        with pytest.raises(UserError):
            Recipe(steps)


@pytest.mark.parametrize(
    "config, recipe",
    [
        ({"method": "moee", "clustering": "hdbscan", "keep": 0.9, "experts": None, "top_k": 1, "seed": 2},
         make_recipe(preset="compensated", values={"keep": 0.9, "seed": 2})),
        ({"clustering": "none", "statistics": "routed", "attention_macs": 0.8, "attention_heads": "equal", "seed": 1},
         make_recipe("static", values={
             "attention_macs": 0.8, "attention_heads": "equal", "seed": 1, "keep": 0.95, "width_multiple": 1,
         })),
        ({"method": "moefication", "experts": 8, "top_k": 2, "compensation": "mean", "keep": 0.95, "attention_macs": 1.0},
         make_recipe("moefication", values={"experts": 8, "top_k": 2})),
        ({"method": "clear-moe", "refit": False, "energy": 0.9, "attention_macs": None},
         make_recipe("clear-moe", values={"energy": 0.9, "compensation": "mean"})),
    ],
)  # fmt: skip
def test_options_of_the_former_version_are_recipes_now(config, recipe):
    assert read_recipe_json(recipe_of(config), "x") == recipe


def test_a_plan_of_the_former_version_is_read(tmp_path):
    spec = tiny_spec()
    config = {"method": "moee", "clustering": "none", "target_macs": 0.7, "seed": 0, "attention_macs": 0.8}
    point = {"method": "static", "allocation": "share", "macs": 0.7, "config": config}
    dense = {**point, "method": "dense", "config": None}
    body = {"model": spec.model_dump(mode="json"), "data": "digits", "winner": point, "points": [point, dense], "front": [point]}
    write_manifest(tmp_path, "plan.json", "moee.plan/1", body)
    expected = make_recipe("static", values={"target_macs": 0.7, "attention_macs": 0.8, "width_multiple": 1})
    assert read_plan(tmp_path, spec) == expected
    write_manifest(tmp_path, "plan.json", "moee.plan/1", {**body, "winner": dense})
    with pytest.raises(UserError, match="the dense model wins"):
        read_plan(tmp_path, spec)
    write_manifest(tmp_path, "plan.json", "moee.plan/1", {**body, "winner": {**point, "config": 7}})
    with pytest.raises(UserError, match="recipe: expected an object with steps, came 7"):
        read_plan(tmp_path, spec)


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 5000])
@pytest.mark.parametrize(
    "text", ['seed = {}\n[[step]]\nmethod = "static"', '[[step]]\nmethod = "static"\nkeep = {}', "step = [{}]"]
)
def test_numbers_of_thousands_of_digits_are_refused(tmp_path, text, number):
    """Python reads and writes none of more than 4,300 decimal digits."""
    path = tmp_path / "recipe.toml"
    path.write_text(text.format(number))
    with pytest.raises(UserError, match="is no TOML: Exceeds|line 1: seed|line 3: keep|line 1: expected steps") as refused:
        read_recipe(path)
    assert len(str(refused.value)) < 400


def test_a_method_at_the_head_of_the_list_is_no_default(monkeypatch):
    monkeypatch.setattr("moee.methods.registry.METHODS", [method_named("static"), *METHODS])
    assert make_recipe().method.name == "experts"


def test_an_elimination_takes_the_sensitivitys_options():
    """It measures the metric of errors with them, whatever the criterion."""
    ranked, eliminated = (make_recipe("experts", "compensated", {"neurons": name}) for name in ("ranked", "eliminated"))
    given = {"sensitivity_tokens": 500}
    with pytest.raises(UserError, match="--sensitivity-tokens is for --criterion .* or --neurons eliminated"):
        refuse_idle_options(ranked, given)
    refuse_idle_options(eliminated, given)
