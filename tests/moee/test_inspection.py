"""`moee inspect`: the paper's dense figures, and an artifact's layers."""

import math

import pytest

from moee.artifacts.inspection import inspect_artifact, inspect_dense
from moee.artifacts.model import MoeeModel
from moee.layers.report import routing_entropy
from moee.layers.routed import routed_layers
from moee.methods.recipe import Recipe
from moee.models.model import ModelSpec
from tests.conftest import tiny_spec

# Berisha et al., Tables 1 and 5: GMACs and millions of parameters
PAPER = {
    "deit_tiny_patch16_224": (1.26, 5.72),
    "deit_small_patch16_224": (4.61, 22.05),
    "deit_base_patch16_224": (17.58, 86.57),
    "swin_tiny_patch4_window7_224": (4.49, 28.29),
    "swin_small_patch4_window7_224": (8.74, 49.61),
    "swin_base_patch4_window7_224": (15.43, 87.77),
    "convnext_tiny": (4.46, 28.59),
    "convnext_small": (8.68, 50.22),
    "convnext_base": (15.36, 88.59),
}


@pytest.mark.parametrize("name", PAPER)
def test_dense_figures_of_the_papers_models(name):
    result = inspect_dense(ModelSpec(name=name, timm_name=name))
    assert result.dense["macs"] / 1e9 == pytest.approx(PAPER[name][0], rel=0.01)
    assert result.dense["params"] / 1e6 == pytest.approx(PAPER[name][1], rel=0.01)
    assert result.moee is None and all(layer.macs == layer.dense_macs > 0 for layer in result.layers)


def test_artifact_layers_add_up(tiny_moee):
    model, _, _, config, _ = tiny_moee
    shares = {name: [0.7, 0.1, 0.1, 0.1] for name in routed_layers(model)}
    moee = MoeeModel(model, tiny_spec(), Recipe.of(config), "tiny", info={"stages": {"extracted": {"shares": shares}}})
    result = inspect_artifact(moee)
    assert result.moee is not None
    saved = sum(layer.dense_macs - layer.macs for layer in result.layers)
    assert abs(result.dense["macs"] - saved - result.moee["macs"]) <= len(result.layers)
    assert result.dense["params"] - sum(x.dense_params - x.params for x in result.layers) == result.moee["params"]
    assert all(layer.balance == pytest.approx(2.8) for layer in result.layers)


def test_entropy():
    assert routing_entropy([0.25] * 4) == pytest.approx(1.0)
    assert routing_entropy([1.0, 0.0]) == 0.0
    assert routing_entropy([0.5, 0.5, 0.0, 0.0]) == pytest.approx(math.log(2) / math.log(4))


def test_accuracy_only_where_labels_and_head_number_the_same_classes(tiny_model, monkeypatch):
    import moee.stages.session
    from tests.conftest import teach, tiny_images

    for classes, reported in ((10, True), (4, False)):
        splits = (tiny_images(20, classes=classes), tiny_images(20, classes=classes))
        monkeypatch.setattr(moee.stages.session, "load_splits", lambda *args, splits=splits, **kwargs: splits)
        session = moee.stages.session.Session(tiny_spec(), "tiny")
        if reported:
            teach(session.dense, splits[0])
            session.spec = session.spec.model_copy(update={"random_seed": None})
        kept = session.measure(session.dense, None, "dense")["retention"]
        assert (kept["accuracy"] is not None) == reported
        assert kept["top1_agreement"] in ((1.0,) if reported else (1.0, None)) and kept["class_cosine"] == pytest.approx(1.0)
