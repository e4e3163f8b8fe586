"""Artifacts on disk, and distillation with resumption."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.config import FinetuneConfig, validated
from moee.data.validation import other_images, validation_images
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.measure.evaluation import run
from moee.methods.experts import ExpertsOptions
from moee.methods.recipe import Recipe, method_options
from moee.parallel.group import SOLO
from moee.store.artifact import sha256_file
from moee.store.atomic import atomic_folder
from moee.train.finetuning import finetune
from moee.train.rate import rate
from moee.train.step import Trainer, distillation_loss
from moee.train.trial import _largest_as_good, rates_of, tried_rate
from tests.conftest import tiny_spec


@pytest.fixture
def saved(tiny_moee, tmp_path):
    model, _, data, config, _ = tiny_moee
    path = tmp_path / "artifact"
    checkpoint.save(MoeeModel(model, tiny_spec(), Recipe.of(config), "tiny"), path)
    return model, data, path


def test_round_trip(saved):
    model, data, path = saved
    again = checkpoint.load(path)
    assert again.recipe == Recipe.of(method_options(clustering="kmeans", clusters=4, cluster_tokens=500))
    with torch.no_grad():
        assert torch.equal(again.model(data.images), model(data.images))
    assert [layer.load for layer in routed_layers(again.model).values()] == [
        layer.load for layer in routed_layers(model).values()
    ]


def rewrite(path, change):
    """Change the manifest or the tensors and put the hashes right again, so that only deeper checks can object."""
    manifest = json.loads((path / "moee.json").read_text())
    state = load_file(path / "model.safetensors")
    change(manifest, state)
    save_file(state, path / "model.safetensors")
    manifest["files"]["model.safetensors"] = sha256_file(path / "model.safetensors")
    (path / "moee.json").write_text(json.dumps(manifest))


def _out_of_range(manifest, state):
    state["blocks.0.mlp.neurons"][3] = 10_000


def _descending(manifest, state):
    state["blocks.0.mlp.neurons"][:2] = state["blocks.0.mlp.neurons"][:2].flip(0)


def _offsets(manifest, state):
    state["blocks.0.mlp.offsets"][1] = -1


def _missing(manifest, state):
    del state["blocks.1.mlp.router"]


def _wrong_layer(manifest, state):
    manifest["layers"][0]["name"] = "blocks.9.mlp"


def _no_mlp(manifest, state):
    manifest["layers"][0]["name"] = "blocks.0.attn"


def _wrong_count(manifest, state):
    manifest["layers"][0]["experts"] = 7


def _unknown_field(manifest, state):
    manifest["layers"][0]["surprise"] = 1


def _schema(manifest, state):
    manifest["schema"] = "moee.model/99"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_out_of_range, "neuron id lies outside"),
        (_descending, "do not ascend"),
        (_offsets, "offsets do not rise"),
        (_missing, "blocks.1.mlp.router should have shape"),
        (_wrong_layer, "names layer blocks.9.mlp"),
        (_no_mlp, "cannot be right: `blocks.0.attn` is no plain MLP: .*; extract again"),
        (_wrong_count, "should have shape"),
        (_unknown_field, "Extra inputs"),
        (_schema, "expected 'moee.model/2'"),
    ],
)
def test_damage_is_named(saved, change, message):
    rewrite(saved[2], change)
    with pytest.raises(UserError, match=message):
        checkpoint.load(saved[2])


def test_changed_bytes_are_noticed(saved):
    _, _, path = saved
    raw = bytearray((path / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (path / "model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="does not match the hash"):
        checkpoint.load(path)


def test_existing_folder_is_refused_and_failure_leaves_it_alone(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(UserError, match="exists; choose another --out or pass --force"):
        with atomic_folder(target):
            pass
    with pytest.raises(KeyboardInterrupt):
        with atomic_folder(target, force=True) as folder:
            (folder / "a").write_text("2")
            raise KeyboardInterrupt
    assert (target / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing half-written may stay"
    with atomic_folder(target, force=True) as folder:
        (folder / "a").write_text("3")
    assert (target / "a").read_text() == "3"


def test_config_round_trip_and_refusals():
    config = method_options("paper", keep=0.8, exclude=("blocks.1",))
    assert ExpertsOptions.model_validate_json(config.model_dump_json()) == config
    for bad, message in [
        (dict(keep=1.5), "--keep"),
        (dict(clusters=4, clustering="hdbscan"), "chooses their number itself"),
        (dict(eps=0.5), "--eps is for dbscan"),
        (dict(clustering="magic"), "--clustering"),
        (dict(nonsense=1), "nonsense"),
    ]:
        with pytest.raises(UserError, match=message):
            validated(ExpertsOptions, bad)
    with pytest.raises(UserError, match="unknown preset"):
        method_options("best")


TUNE = FinetuneConfig(epochs=4, lr=1e-3, batch_size=8)


@pytest.fixture
def lossy(tiny_moee):
    """A model that has something to learn: experts cut without compensation."""
    from tests.conftest import extract

    _, dense, data, _, _ = tiny_moee
    model = copy.deepcopy(dense)
    extract(model, data, method_options("paper", keep=0.5, clustering="kmeans", clusters=4))
    return model, dense, data


@pytest.mark.parametrize("classes", [10, 0], ids=["logits", "features"])
def test_finetuning_approaches_the_dense_model(lossy, classes):
    model, dense, data = lossy
    if not classes:
        for m in (model, dense):
            m.reset_classifier(0)
    with torch.no_grad():
        before = (model(data.images) - dense(data.images)).square().mean()
    routers = {n: layer.router.clone() for n, layer in routed_layers(model).items()}
    result = finetune(model, dense, data, TUNE)
    with torch.no_grad():
        after = (model(data.images) - dense(data.images)).square().mean()
    assert after < 0.7 * before and result.best_epoch > 0
    assert min(result.validation_loss) == result.validation_loss[result.best_epoch]
    assert all(torch.equal(routers[n], layer.router) for n, layer in routed_layers(model).items())


def test_a_single_logit_is_distilled_as_the_two_classes_that_it_stands_for():
    """The softmax of one number is 1: its loss was 0 whatever the student said."""
    student, teacher = torch.tensor([[0.3], [-2.0]]), torch.tensor([[1.5], [0.2]])
    pair = [torch.cat([torch.zeros(2, 1), logit], 1) for logit in (student, teacher)]
    loss = distillation_loss(student, teacher, True)
    assert loss > 0.1 and torch.equal(loss, distillation_loss(*pair, True))
    assert float(distillation_loss(teacher, teacher, True)) == pytest.approx(0, abs=1e-7)


def test_token_distillation_brings_the_last_feature_map_closer(lossy):
    model, dense, data = lossy

    def error():
        with torch.no_grad():
            return (model.forward_features(data.images) - dense.forward_features(data.images)).square().mean()

    before = error()
    result = finetune(model, dense, data, TUNE.model_copy(update={"distil": "tokens", "warmup": 0.2}))
    assert error() < 0.8 * before and result.best_epoch > 0


def test_learning_rate_rises_then_falls_to_zero():
    rates = [rate(s, 100, 0.1) for s in range(100)]
    assert rates[0] < 0.1 and max(rates) == rates[10] == 1.0
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001 and rate(0, 100, 0.0) == 1.0


def test_a_run_that_gets_worse_keeps_the_starting_weights(lossy):
    model, dense, data = lossy
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = finetune(model, dense, data, FinetuneConfig(epochs=1, lr=5.0, batch_size=8))
    assert result.best_epoch == 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_run_without_a_learning_rate_takes_the_tried_one(lossy, caplog):
    model, dense, data = lossy
    free, said = FinetuneConfig(epochs=1, batch_size=8), copy.deepcopy(model)
    caplog.set_level("INFO")
    result = finetune(model, dense, data, free)
    assert f"learning rate {result.lr:g}, by a trial" in caplog.text
    assert result.lr in [float(f"{each:.2g}") for each in rates_of(free)]
    assert finetune(said, dense, data, free.model_copy(update={"lr": result.lr})).lr == result.lr
    for a, b in zip(model.parameters(), said.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("more", [{}, {"clip_norm": 0.1}, {"relative_lr": True}, {"accumulate": 2, "distil": "tokens"}])
def test_a_trial_leaves_the_model_as_it_came_and_asks_more_of_one_that_is_far(lossy, more):
    model, dense, data = lossy
    config, count = FinetuneConfig(batch_size=8, **more), len(data)
    train, judged = other_images(count), validation_images(count)

    told = []

    def tried(student):
        trainer = Trainer(student, dense, run(dense, data).features, config, SOLO)
        parts = dict(student.named_parameters())
        return tried_rate(trainer, parts, data, train, judged, report=lambda *words: told.append(words))

    before = {k: v.clone() for k, v in model.state_dict().items()}
    far, share = tried(model)
    assert told[0][1] == 0 and [done == total for _, done, total in told].index(True) == len(told) - 1, "done once, at the end"
    assert far > rates_of(config)[0] and share < 0.95, "more than the first steps, which go by signs, are worth"
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    near = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(1e-7 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert tried(near)[0] < far


def test_of_rates_as_good_the_largest_is_taken():
    nan = float("nan")
    assert _largest_as_good([0.9, 0.5, 0.505, 0.7], 1.0) == 2 and _largest_as_good([0.99, 0.985, 1.01], 1.0) == 1
    assert _largest_as_good([1.1, 1.2], 1.0) == _largest_as_good([nan], 1.0) == _largest_as_good([], 1.0) == 0
    assert _largest_as_good([0.9, nan], 1.0) == 0


@pytest.mark.parametrize("lr", [1e-3, None])
def test_resuming_gives_the_bytes_of_an_uninterrupted_run(lossy, tmp_path, lr):
    model, dense, data = lossy
    config = FinetuneConfig(epochs=4, lr=lr, batch_size=8)
    whole = copy.deepcopy(model)
    finetune(whole, dense, data, config)

    steps = 0

    def interrupt(message, done, total):
        nonlocal steps
        steps += message == "finetune"
        if steps == 14:  # in the middle of the third epoch
            raise KeyboardInterrupt

    part = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        finetune(part, dense, data, config, interrupt, resume=tmp_path)
    again = copy.deepcopy(model)
    finetune(again, dense, data, config, resume=tmp_path)
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)
    with pytest.raises(UserError, match="another config"):
        finetune(copy.deepcopy(model), dense, data, config.model_copy(update={"lr": 1e-4}), resume=tmp_path)
    other = copy.deepcopy(dense)
    torch.nn.init.normal_(other.blocks[0].mlp.fc1.weight)
    with pytest.raises(UserError, match="another teacher"):
        finetune(copy.deepcopy(model), other, data, config, resume=tmp_path)
