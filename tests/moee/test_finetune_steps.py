"""What a step of the fine-tuning moves, and how far."""

import copy

import pytest
import torch

from moee.config import FinetuneConfig, validated
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.methods.recipe import method_options
from moee.models.model import load_model
from moee.train import finetuning
from moee.train.finetuning import finetune
from moee.train.rate import LEAST_RMS, make_optimiser
from moee.train.step import Trainer
from tests.conftest import extract, tiny_images, tiny_spec


@pytest.fixture
def pair():
    torch.manual_seed(0)
    dense, data = load_model(tiny_spec()), tiny_images(16)
    model = copy.deepcopy(dense)
    extract(model, data, method_options(clustering="kmeans", clusters=3, cluster_tokens=300, keep=0.8, compensation="mean"))
    return dense, model, data


def tuned(pair, **fields):
    dense, model, data = pair
    model = copy.deepcopy(model)
    finetune(model, dense, data, FinetuneConfig(**{"epochs": 1, "batch_size": 4, "lr": 1e-5, **fields}))
    return model


def moved(before, after):
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return {name for (name, a), b in pairs if not torch.equal(a, b)}


def test_experts_alone(pair):
    """The backbone keeps every bit, and can be trained again afterwards."""
    _, model, _ = pair
    after = tuned(pair, train="experts")
    inside = tuple(f"{name}." for name in routed_layers(model))
    changed = moved(model, after)
    assert changed and all(name.startswith(inside) for name in changed)
    assert {"w_up", "w_down", "b_out"} <= {name.rpartition(".")[2] for name in changed}
    assert not any(name.endswith("router") for name in changed)
    assert all(p.requires_grad for name, p in after.named_parameters() if not name.endswith("router"))
    assert any(not name.startswith(inside) for name in moved(model, tuned(pair)))


def test_the_backbone_is_free_again_after_an_error(pair, monkeypatch):
    dense, model, data = pair
    monkeypatch.setattr(Trainer, "backward", lambda self, images, parts: float("nan"))
    with pytest.raises(Exception, match="the loss became nan"):
        finetune(model, dense, data, FinetuneConfig(epochs=1, train="experts"))
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.endswith("router"))


def test_checkpointing_gives_the_same_experts(pair):
    plain, checkpointed = tuned(pair, train="experts"), tuned(pair, train="experts", checkpointing=True)
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    assert moved(pair[1], checkpointed)


def test_relative_steps_are_a_share_of_each_tensors_size():
    big, small, zero = (torch.nn.Parameter(torch.full((3,), value)) for value in (2.0, 0.05, 0.0))
    config = FinetuneConfig(lr=0.01, relative_lr=True, weight_decay=0)
    optimiser = make_optimiser([big, small, zero], config)
    for parameter in (big, small, zero):
        parameter.grad = torch.ones(3)
    optimiser.step()
    # AdamW's first step is the learning rate itself
    assert big[0].item() == pytest.approx(2.0 * 0.99) and small[0].item() == pytest.approx(0.05 * 0.99)
    assert zero[0].item() == pytest.approx(-0.01 * LEAST_RMS)
    absolute = make_optimiser([big, small], FinetuneConfig(lr=0.01))
    assert {slot["lr"] for slot in absolute.param_groups} == {0.01}


def test_a_gradient_is_cut_to_its_norm(pair, monkeypatch):
    norms = []
    real = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        gradients = [p.grad.flatten() for slot in self.param_groups for p in slot["params"] if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    tuned(pair)
    free = list(norms)
    norms.clear()
    limit = min(free) / 3
    tuned(pair, clip_norm=limit)
    assert norms and norms == pytest.approx([limit] * len(free), rel=1e-3)
    norms.clear()
    tuned(pair, clip_norm=max(free) * 1000)
    assert norms == pytest.approx(free, rel=1e-6), "a smaller one stays as it is"


def test_a_run_with_relative_steps_goes_on_where_it_stopped(pair, tmp_path, monkeypatch):
    """The steps are measured against the weights at the start, not those at the interruption."""
    whole = tuned(pair, epochs=2, relative_lr=True, lr=1e-3)
    dense, model, data = pair
    config = FinetuneConfig(epochs=2, batch_size=4, relative_lr=True, lr=1e-3)
    first, calls = copy.deepcopy(model), []
    real = Trainer.backward

    def interrupted(self, images, parts):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return real(self, images, parts)

    monkeypatch.setattr(Trainer, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(first, dense, data, config, resume=tmp_path)
    monkeypatch.setattr(Trainer, "backward", real)
    second = copy.deepcopy(model)
    finetune(second, dense, data, config, resume=tmp_path)
    assert moved(model, whole)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_masked_training_is_the_same_run(pair, monkeypatch):
    """The same losses but for rounding, and the mask ends with the run."""
    from moee.layers.routed import RoutedFFN

    calls = []
    real = RoutedFFN._masked
    monkeypatch.setattr(RoutedFFN, "_masked", lambda self, *args: calls.append(1) or real(self, *args))
    plain = tuned(pair, weight_decay=0)
    assert not calls
    masked = tuned(pair, weight_decay=0, masked=True)
    assert calls and not any(layer.masked for layer in routed_layers(masked).values())
    before = dict(pair[1].named_parameters())
    for (name, a), b in zip(plain.named_parameters(), masked.parameters(), strict=True):
        # an entry whose gradient is rounding alone may take AdamW's step the other way
        agree = ((a - before[name]) - (b - before[name])).abs() <= 1e-6
        assert agree.float().mean() > 0.97, name


def not_run():
    raise AssertionError("the dense model ran before the refusal")


def interrupted_run(pair, folder, monkeypatch):
    """The state after one of two epochs, in `folder`."""
    dense, model, data = pair
    calls, real = [], Trainer.backward

    def stop(self, images, parts):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return real(self, images, parts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "backward", stop)
        patch.setattr(finetuning, "tried_rate", lambda *args, **more: (1e-5, 0.9))
        finetune(copy.deepcopy(model), dense, data, FinetuneConfig(epochs=2, batch_size=4), resume=folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"lr": 1e-3}, "another config.lr"), ({"epochs": 3}, "another config.epochs"), ({"augment": 1}, "another config.augment")],
)
def test_another_run_is_refused_before_the_work(pair, tmp_path, monkeypatch, fields, message):
    interrupted_run(pair, tmp_path, monkeypatch)
    dense, model, data = pair
    monkeypatch.setattr("moee.train.resume.fingerprint", lambda *_: pytest.fail("images were read before the refusal"))
    with pytest.raises(UserError, match=message):
        finetune(model, dense, data, FinetuneConfig(**{"epochs": 2, "batch_size": 4, **fields}), resume=tmp_path, teacher=not_run)


def test_a_teacher_whose_classes_changed_places_is_another(pair, tmp_path, monkeypatch):
    interrupted_run(pair, tmp_path, monkeypatch)
    dense, model, data = pair
    with torch.no_grad():
        for tensor in (dense.head.weight, dense.head.bias):
            tensor[:2] = tensor[:2].flip(0)
    with pytest.raises(UserError, match="another teacher"):
        finetune(model, dense, data, FinetuneConfig(epochs=2, batch_size=4), resume=tmp_path, teacher=not_run)


def test_other_images_and_a_lost_state_are_refused_before_the_work(pair, tmp_path, monkeypatch):
    interrupted_run(pair, tmp_path, monkeypatch)
    dense, model, data = pair
    config, other = FinetuneConfig(epochs=2, batch_size=4), tiny_images(16)
    other.images.neg_()
    with pytest.raises(UserError, match="another content"):
        finetune(model, dense, other, config, resume=tmp_path, teacher=not_run)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="is missing or changed"):
        finetune(model, dense, data, config, resume=tmp_path, teacher=not_run)


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_a_model_without_gradients_is_refused_before_the_work(pair, switch):
    dense, model, data = pair
    model.forward = switch()(model.forward)
    with pytest.raises(UserError, match="nothing in VisionTransformer that --train all names can learn: .*without gradients"):
        finetune(model, dense, data, FinetuneConfig(epochs=1), teacher=not_run)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 2.0}, "--temperature is for logits, and VisionTransformer gives features"),
        ({"train_router": True}, "--train-router: no layer of VisionTransformer has a router"),
        ({"train": "experts"}, "--train experts trains routed layers and narrowed attention, and VisionTransformer has none"),
    ],
)
def test_options_that_do_nothing_about_a_model_are_refused(fields, message):
    """The model has merged tokens or low-rank maps alone, say, and is a backbone."""
    backbone = load_model(tiny_spec(num_classes=0))
    with pytest.raises(UserError, match=message):
        finetune(copy.deepcopy(backbone), backbone, tiny_images(8), FinetuneConfig(epochs=1, **fields), teacher=not_run)
    finetune(copy.deepcopy(backbone), backbone, tiny_images(8), FinetuneConfig(epochs=1, lr=1e-5))


def test_a_validation_of_all_images_is_refused(pair):
    dense, model, data = pair
    with pytest.raises(UserError, match="--validation 0.99 leaves none of 16 images to train on; give less"):
        finetune(model, dense, data, FinetuneConfig(validation=0.99), teacher=not_run)


def test_force_amp_alone_is_refused():
    with pytest.raises(UserError, match="--force-amp does nothing without --amp; give that too, or leave it out"):
        validated(FinetuneConfig, {"force_amp": True})
    assert validated(FinetuneConfig, {"force_amp": True, "amp": "bf16"}).force_amp
