"""The small ViT trained here: learns, is deterministic, is trained once; what the alias refuses."""

import json

import pytest
import torch

from exporter import cli
from exporter.pretrained import ModelOptions, resolve
from moee.errors import UserError
from moee.models.model import build_model, load_model
from moee.train import scratch
from moee.train.scratch import ScratchRecipe, scratch_spec, train
from tests.conftest import tiny_images

SMALL = ScratchRecipe(patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4, epochs=20, warmup_epochs=1, batch_size=16)


def test_training_learns_and_repeats():
    data, random_state = tiny_images(64), torch.random.get_rng_state()
    states = [train(SMALL, data) for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(torch.random.get_rng_state(), random_state), "the caller's random state is left alone"
    other = train(SMALL.model_copy(update={"seed": 1}), data)
    assert not torch.equal(states[0]["head.weight"], other["head.weight"])
    model = build_model(scratch.ModelSpec(name="x", timm_name=scratch.TIMM_NAME, kwargs=SMALL.model_kwargs()))
    model.load_state_dict(states[0])
    with torch.no_grad():
        accuracy = (model(data.images).argmax(1) == torch.tensor(data.labels)).double().mean()
    assert accuracy > 0.9, "four patterns in noise are easy"


def test_trained_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEE_CACHE", str(tmp_path))
    calls, state = [], train(SMALL, tiny_images(16))
    monkeypatch.setattr(scratch, "train", lambda recipe, report: calls.append(recipe) or state)
    first, second = scratch_spec(SMALL), scratch_spec(SMALL)
    assert first == second and len(calls) == 1
    assert torch.equal(load_model(first).state_dict()["head.weight"], state["head.weight"])
    assert [p.suffix for p in tmp_path.iterdir() if p.name != "locks"] == [".safetensors"], "nothing half-written stays"
    scratch_spec(SMALL.model_copy(update={"epochs": 7}))
    assert len(calls) == 2, "another recipe is another file"


def test_alias_refuses_what_it_cannot_take():
    refused = {"img_size": [64], "pretrained": True, "checkpoint": "x.safetensors", "num_classes": 3, "random_weights": 0}
    for options in ({name: value} for name, value in refused.items()):
        with pytest.raises(UserError, match="does not go with the alias vit-scratch, which brings its own"):
            resolve("vit-scratch", "digits", ModelOptions(**options))


def test_inspection_trains_nothing(monkeypatch, capsys):
    monkeypatch.setattr(scratch, "train", lambda *args, **kwargs: pytest.fail("trained"))
    assert cli.main(["inspect", "vit-scratch", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert len(figures["layers"]) == ScratchRecipe().depth and 600_000 < figures["dense"]["params"] < 800_000


@pytest.mark.slow
def test_digits_accuracy():
    """The real recipe (minutes, or the cached weights): far above chance on held-out digits, with room to fall."""
    from moee.stages.session import Session

    reference = Session(scratch_spec(), "digits").reference
    accuracy = float((reference.features.argmax(1) == reference.labels).double().mean())
    assert accuracy > 0.97
