"""Where a model's weights come from is always known: the same command later works on the same weights, bit by bit."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file

from exporter import cli, pretrained
from exporter.graph.export import export
from exporter.runners import OnnxRunner
from moee.artifacts import checkpoint
from moee.artifacts.inspection import inspect_artifact
from moee.artifacts.model import MoeeModel
from moee.config import FinetuneConfig
from moee.errors import UserError
from moee.methods.recipe import Recipe, method_options
from moee.models.model import ModelSpec, build_model, load_model
from moee.models.source import ModelOptions, named_model, named_spec, with_random
from moee.planning.plan import read_plan
from moee.stages.extract import run_extract
from moee.stages.finetune import run_finetune
from moee.stages.session import Session
from moee.store.cache import tensor_hash
from tests.conftest import TINY, tiny_images, tiny_spec
from tests.exporter.graphs import write_export

SPEC = tiny_spec(depth=1)
NO_SOURCE = {"random_seed": None}


def equal(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("classes, heads", [(None, 1), (0, 0)])
def test_a_head_that_nothing_has_trained_is_told_once(classes, heads):
    told: list[str] = []
    options = ModelOptions(random_weights=0, num_classes=classes)
    named_model("test_vit", options, told.append)
    said = [text for text in told if "is random" in text]
    assert len(said) == heads
    assert all("its head of 1,000 classes" in text and "--num-classes 0 compares features" in text for text in said)


@pytest.fixture
def images(monkeypatch):
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (tiny_images(24, classes=10),) * 2)


@pytest.fixture
def artifact(images, tmp_path):
    """An extraction from random weights, by a session that is gone when others read it."""
    config = method_options(clustering="kmeans", clusters=3, cluster_tokens=200)
    run_extract(SPEC, "tiny", config, tmp_path / "artifact")
    torch.manual_seed(99)  # later commands start somewhere else
    return tmp_path / "artifact"


def without_source(folder, name="moee.json"):
    """What the first release recorded of random weights: nothing."""
    body = json.loads((folder / name).read_text())
    del body["model"]["random_seed"]
    (folder / name).write_text(json.dumps(body))


def test_a_seed_draws_the_same_weights_and_leaves_the_callers_random_state():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = load_model(tiny_spec())
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert equal(first, load_model(tiny_spec()))
    assert not equal(first, load_model(tiny_spec().model_copy(update={"random_seed": 1})))
    with torch.device("meta"):
        assert all(p.is_meta for p in load_model(tiny_spec()).parameters())
    assert equal(first, load_model(tiny_spec()))


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, "has no weights: give --pretrained"),
        ({"pretrained": True, "random_seed": 0}, "two sources of weights"),
        ({"pretrained": True, "weights": "w.safetensors"}, "two sources of weights"),
        ({"weights": "w.safetensors", "random_seed": 0}, "two sources of weights"),
    ],
)
def test_a_spec_names_one_source_of_weights(given, words):
    with pytest.raises(UserError, match=words):
        load_model(ModelSpec(name="x", timm_name="vit_tiny_patch16_224", kwargs=TINY, **given))


@pytest.mark.parametrize(
    "name, flags, words",
    [
        ("test_vit", {}, "test_vit has no weights yet: give --pretrained .* --checkpoint FILE .* --random-weights SEED"),
        ("test_vitt", {}, "unknown model 'test_vitt'"),
        ("test_vit", {"pretrained": True, "checkpoint": "w"}, "--pretrained and --checkpoint each name"),
        ("test_vit", {"pretrained": True, "random_weights": 1}, "--pretrained and --random-weights each name"),
        ("dinov2-s", {"random_weights": 1}, "--random-weights does not go with the alias dinov2-s"),
        ("dinov2-s", {"pretrained": True}, "--pretrained does not go with the alias dinov2-s"),
        ("vit-scratch", {"checkpoint": "w"}, "--checkpoint does not go with the alias vit-scratch"),
    ],
)
def test_the_command_line_asks_for_one_source(name, flags, words):
    with pytest.raises(UserError, match=words):
        pretrained.resolve(name, "digits", pretrained.ModelOptions(**flags))


@pytest.mark.parametrize("command", ["extract", "plan", "ablate", "ablate-clear"])
def test_every_command_refuses_a_model_without_weights_before_any_work(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: pytest.fail("images were read"))
    model = ["--model", "test_vit"] if command == "ablate" else ["test_vit"]
    budget = ["--target-macs", "0.7"] if command == "plan" else []
    assert cli.main([command, *model, "--data", "digits", *budget, "--out", str(tmp_path / "out")]) == 2
    assert "test_vit has no weights yet" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_later_commands_work_on_the_weights_that_were_extracted_from(artifact, tmp_path):
    dense = load_model(SPEC)
    moee = checkpoint.load(artifact)
    assert moee.spec.random_seed == 0 and equal(moee.dense(), dense)
    export(moee, tmp_path / "export", source=artifact)
    x = tiny_images(4).images
    with OnnxRunner(tmp_path / "export" / "dense.onnx") as runner, torch.inference_mode():
        assert (torch.from_numpy(runner.run(x.numpy())[0]) - dense(x)).abs().max() < 1e-4
    tuned = run_finetune(artifact, FinetuneConfig(epochs=1, lr=1e-6), tmp_path / "tuned")
    extracted = moee.info["stages"]["extracted"]["retention"]["class_cosine"]
    assert tuned.info["stages"]["tuned"]["retention"]["class_cosine"] > extracted - 0.01, "the teacher is the dense model"


def test_a_fine_tuning_that_was_killed_goes_on_with_the_same_teacher(artifact, tmp_path, monkeypatch):
    config = FinetuneConfig(epochs=3, lr=1e-4)
    whole = run_finetune(artifact, config, tmp_path / "whole")

    def killed(message, done, total):
        if message.startswith("finetune") and done == 2:
            raise KeyboardInterrupt

    messages = []
    with pytest.raises(KeyboardInterrupt):
        run_finetune(artifact, config, tmp_path / "tuned", report=lambda *a: (messages.append(a), killed(*a)))
    assert (tmp_path / "tuned.resume").is_dir(), messages
    torch.manual_seed(7)
    assert equal(run_finetune(artifact, config, tmp_path / "tuned").model, whole.model)


def test_an_artifact_whose_dense_model_is_lost(artifact, tmp_path, capsys, images):
    """Made by the first release from random weights: no command may draw others and call them dense."""
    write_export(tmp_path / "export", depth=1, dim=8, heads=2, size=32, patch=8, experts=2, union=8, width=4)
    without_source(artifact)
    without_source(tmp_path / "export", "export.json")
    commands = [
        ["finetune", artifact, "--out"], ["export", artifact, "--out"], ["plots", artifact, "--data", "digits", "--out"],
        ["verify", tmp_path / "export", "--model", artifact, "--out"], ["bench", tmp_path / "export", "--out"],
    ]  # fmt: skip
    for command in commands:
        assert cli.main([*map(str, command), str(tmp_path / "out")]) == 2, command
        error = capsys.readouterr().err
        assert "is lost" in error and "--random-weights SEED" in error and "Traceback" not in error
        out = tmp_path / "out"  # verify leaves a JUnit file that says what it refused
        assert out.exists() == (command[0] == "verify") and not shutil.rmtree(out, ignore_errors=True)
    assert inspect_artifact(checkpoint.load(artifact)).moee["macs"] > 0, "shapes are known without the weights"


def test_inspect_needs_no_weights(capsys):
    assert cli.main(["inspect", "test_vit"]) == 0


def test_results_of_another_draw_do_not_go_together(images, tmp_path):
    from moee.ablation.cells import check_setup, setup_of
    from moee.ablation.grid import make_ablation_config
    from moee.planning.budget import Budget
    from moee.planning.plan import make_plan

    other = tiny_spec().model_copy(update={"random_seed": 1})
    ablation = make_ablation_config()
    check_setup(tmp_path / "ablation", setup_of(Session(tiny_spec(), "tiny"), ablation))
    with pytest.raises(UserError, match="random_seed 0, now 1"):
        check_setup(tmp_path / "ablation", setup_of(Session(other, "tiny"), ablation))
    base = {"cluster_tokens": 200, "tokens": 400, "refit_tokens": 400}
    make_plan(Session(tiny_spec(), "tiny"), Budget(target_macs=0.8), tmp_path / "plan", methods=("static",), base=base)
    read_plan(tmp_path / "plan", tiny_spec())
    with pytest.raises(UserError, match="with random_seed 0, but this model has 1"):
        read_plan(tmp_path / "plan", other)


def test_pretrained_weights_are_those_that_were_recorded(monkeypatch):
    """Another file under the same name, or another version of timm's filter: noticed."""
    downloads = [0, 0, 1]

    def create(name, pretrained=False, **kwargs):
        if pretrained:
            torch.manual_seed(downloads.pop(0))
        return timm.models.create_model(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    spec = pretrained.resolve("test_vit", options=pretrained.ModelOptions(pretrained=True, img_size=[32]))
    assert spec.pretrained and len(spec.weights_sha256) == 64
    load_model(spec)
    with pytest.raises(UserError, match="are not those that the artifact was made from"):
        load_model(spec)


def test_another_machine_that_draws_other_weights_is_noticed(monkeypatch):
    """Not every version and processor makes the same numbers of a seed."""
    spec = pretrained.resolve("test_vit", options=pretrained.ModelOptions(random_weights=3, img_size=[32]))
    assert spec.random_seed == 3
    load_model(spec)
    real = timm.create_model

    def create(name, **kwargs):
        model = real(name, **kwargs)
        with torch.no_grad():
            next(model.parameters()).flatten()[0].add_(1e-3)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError, match="--random-weights 3 draws here are not those"):
        load_model(spec)


def test_the_hash_of_pretrained_weights_leaves_out_what_is_interpolated(monkeypatch):
    """Position embeddings that fit another size differ in the last bit from machine to machine."""
    real = timm.create_model

    def create(name, pretrained=False, **kwargs):
        torch.manual_seed(0)
        model = real(name, **kwargs)
        if pretrained and "img_size" in kwargs:
            with torch.no_grad():
                model.pos_embed += torch.rand(1) * 1e-6
        return model

    monkeypatch.setattr(timm, "create_model", create)
    torch.manual_seed(1)
    spec = pretrained.resolve("test_vit", options=pretrained.ModelOptions(pretrained=True, img_size=[32]))
    torch.manual_seed(2)
    load_model(spec)


def test_shapes_alone_draw_nothing_that_is_used():
    spec = tiny_spec().model_copy(update=NO_SOURCE)
    with torch.device("meta"):
        assert build_model(spec).head.weight.is_meta


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "levit_128s", "fastvit_t8"])
def test_models_with_batch_norms_have_a_hash(name):
    """Their counters are scalars."""
    spec = with_random(named_spec(name, {})[0], 3)
    assert len(spec.weights_sha256) == 64
    load_model(spec)


def test_hashes_of_other_tensors_are_those_of_earlier_versions():
    tensors = torch.arange(6.0).reshape(2, 3), torch.tensor([1, 2]), torch.zeros(0), torch.ones(2, 2).bfloat16().t()
    assert tensor_hash(*tensors, extra="x") == "dd22f30ac786076541e929c1865bd0372e399d67a6875a9743374ff00870094e"
    assert tensor_hash(torch.tensor(1)) != tensor_hash(torch.tensor([1])) != tensor_hash(torch.tensor(2))


@pytest.mark.parametrize(
    "kwargs",
    [{"depth": 10**6}, {"depth": float("nan")}, {"embed_dim": 10**9}, {"block": {"layers": [[10**6]]}}, {"depths": (600, 600)}],
)
def test_arguments_beyond_any_model_are_refused_before_it_is_built(kwargs, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("built"))
    for make in (build_model, load_model):
        with pytest.raises(UserError, match="test_vit asks for .*; expected at most"):
            make(ModelSpec(name="test_vit", timm_name="test_vit", kwargs=kwargs, random_seed=0))


def test_a_classifier_of_imagenet_21k_is_no_size_beyond_any_model():
    with torch.device("meta"):
        assert build_model(ModelSpec(name="x", timm_name="test_vit", kwargs={"num_classes": 21843})).num_classes == 21843


def test_loading_an_artifact_leaves_the_random_state(tmp_path, tiny_moee):
    model, _, _, config, _ = tiny_moee
    checkpoint.save(MoeeModel(model, tiny_spec(), Recipe.of(config), "tiny"), tmp_path / "model")
    before = torch.get_rng_state()
    checkpoint.load(tmp_path / "model").layout()
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_a_manifest_names_need_a_hash(tmp_path, tiny_moee):
    """A spec by hand may lack it; saving takes it."""
    model, dense, _, config, _ = tiny_moee
    save_file(dense.state_dict(), tmp_path / "w.safetensors")
    spec = tiny_spec().model_copy(update={"random_seed": None, "weights": str(tmp_path / "w.safetensors")})
    assert equal(load_model(spec), dense)
    checkpoint.save(MoeeModel(model, spec, Recipe.of(config), "tiny"), tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert len(loaded.spec.weights_sha256) == 64 and equal(loaded.dense(), dense)
    body = json.loads((tmp_path / "model" / "moee.json").read_text())
    body["model"]["weights_sha256"] = None
    (tmp_path / "model" / "moee.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match="moee.json has no hash of the weights '.*w.safetensors' that it names"):
        checkpoint.load(tmp_path / "model")
