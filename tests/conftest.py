"""Shared fixtures: a tiny ViT with random weights, and small images for it."""

import os
import signal

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from moee.data.image_set import TensorSet  # noqa: E402
from moee.measure.probe import fit_probe  # noqa: E402
from moee.methods.context import Context  # noqa: E402
from moee.methods.recipe import Recipe, method_options  # noqa: E402
from moee.models.model import ModelSpec, load_model  # noqa: E402
from moee.progress import silent  # noqa: E402

TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=10)


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in `make test &` of a script: processes of tests would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def tiny_spec(**kwargs) -> ModelSpec:
    return ModelSpec(name="tiny", timm_name="vit_tiny_patch16_224", kwargs={**TINY, **kwargs}, random_seed=0)


def tiny_images(count: int = 48, size: int = 32, classes: int = 4) -> TensorSet:
    """Noise around one random pattern a class, so that tokens form clusters."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(classes, 3, size, size, generator=generator) * 2
    labels = [i % classes for i in range(count)]
    noise = torch.randn(count, 3, size, size, generator=generator) * 0.3
    return TensorSet("tiny", patterns[labels] + noise, labels, classes)


def extract(model, data, options, report=silent, **context):
    """Cut the MLPs of a `model` by the method that the options are of; returns its reports."""
    return Recipe.of(options).method.convert(model, options, Context(data, report, **context))


@torch.no_grad()
def teach(model, data):
    """Fit the head of a random `model` to the labels of `data`, so that its accuracy is one."""
    features = model.forward_head(model.forward_features(data.images), pre_logits=True)
    probe = fit_probe(features, torch.tensor(data.labels), data.num_classes)
    model.head.weight.copy_(probe.weight)
    model.head.bias.copy_(probe.bias)
    return model


@pytest.fixture(autouse=True)
def seeded():
    """Models with random weights are the same ones in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_label_cache(monkeypatch):
    """Labels of earlier tests must not stand in for a clustering; the test of the cache takes this back."""
    monkeypatch.setattr("moee.calibrate.grouping.read_labels", lambda key, count: None)
    monkeypatch.setattr("moee.calibrate.grouping.write_labels", lambda key, labels: None)


@pytest.fixture
def tiny_model():
    torch.manual_seed(0)
    return load_model(tiny_spec())


@pytest.fixture
def tiny_moee(tiny_model):
    """A tiny model with four k-means experts a layer, its dense original, its images."""
    import copy

    dense = copy.deepcopy(tiny_model)
    data = tiny_images()
    config = method_options(clustering="kmeans", clusters=4, cluster_tokens=500)
    reports = extract(tiny_model, data, config)
    return tiny_model, dense, data, config, reports
