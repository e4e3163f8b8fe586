"""Collages: that they repeat, what they show, and who sees them."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moee.config import FinetuneConfig
from moee.data.collage import Collages, _noise, _outline
from moee.data.sources import load_data
from moee.data.transform import Transform, model_transform
from moee.data.views import widened
from moee.errors import UserError
from moee.methods.recipe import method_options
from moee.models.model import load_model
from moee.train.finetuning import finetune
from moee.train.step import Trainer
from tests.conftest import extract, tiny_images, tiny_spec

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SMALL = Transform((3, 32, 32), MEAN, STD, {"mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.9})
FAST = dict(clustering="kmeans", clusters=3, cluster_tokens=300, keep=0.8)


@pytest.fixture
def folder(tmp_path):
    for colour in ("red", "blue"):
        for k in range(5):
            path = tmp_path / "images" / colour / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (90, 60), colour).save(path)
    return tmp_path / "images"


def test_a_collage_depends_on_seed_and_position_alone():
    data = tiny_images(6)
    collages = Collages(data, SMALL, 2, seed=0)
    assert len(collages) == 12 and collages.labels == [-1] * 12
    first = collages.load(7)
    assert first.shape == (3, 32, 32) and first.dtype == torch.float32
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(collages.load(7), first), "the same collage again"
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    assert not torch.equal(collages.load(8), first)
    assert not torch.equal(Collages(data, SMALL, 2, seed=1).load(7), first)


@pytest.mark.parametrize("size", [14, 33, 64])
def test_collages_are_normalised_images_of_the_models_size(size):
    shape = Transform((3, size, size), MEAN, STD, SMALL.config)
    images = torch.stack([Collages(tiny_images(4), shape, 8, 0).load(i) for i in range(32)])
    pixels = torch.stack([shape.pixels(image) for image in images])
    assert images.shape == (32, 3, size, size) and -1e-6 <= pixels.min() and pixels.max() <= 1 + 1e-6
    assert (pixels.flatten(1).std(1) > 0.02).float().mean() > 0.8, "most collages show more than one colour"
    assert pixels.mean((0, 2, 3)).sub(0.45).abs().max() < 0.2, "no colour is preferred"


def test_pictures_come_from_the_positions_given(folder):
    """Pictures of a held-out part are never opened."""
    data = load_data(str(folder), SMALL, "train")
    opened = set()
    real = data.picture
    data.picture = lambda index: opened.add(index) or real(index)
    collages = Collages(data, SMALL, 4, 0, among=[1, 2, 5])
    for i in range(len(collages)):
        collages.load(i)
    assert opened == {1, 2, 5}


def test_an_unreadable_image_is_left_out(folder):
    data = load_data(str(folder), SMALL, "train")
    Path(data.describe(3)).write_bytes(b"no image")
    joined = widened(data, SMALL, 0, 2, 0)
    assert [i for i in range(len(joined)) if isinstance(joined[i][1], str)] == [3]


def test_nothing_but_unreadable_images_is_refused(folder):
    """Collages of gradients alone are no calibration."""
    data = load_data(str(folder), SMALL, "train")
    for i in range(len(data)):
        Path(data.describe(i)).write_bytes(b"no image")
    model = load_model(tiny_spec())
    with pytest.raises(UserError, match=f"none of the {len(data)} images"):
        extract(model, data, method_options(**FAST, collages=3))


def test_unreadable_images_of_an_extraction_are_counted_once(folder):
    data = load_data(str(folder), SMALL, "train")
    Path(data.describe(3)).write_bytes(b"no image")
    extract(load_model(tiny_spec()), data, method_options(**FAST, collages=1))
    assert list(data.skipped) == [3]


def test_noise_falls_with_frequency():
    flat, steep = (np.abs(np.fft.fft2(_noise(64, slope, 0))) for slope in (0.5, 2.0))
    assert flat[0, 1] / flat[32, 32] < steep[0, 1] / steep[32, 32] / 10


def test_outlines_cover_about_their_radius():
    import random

    areas = [np.asarray(_outline(random.Random(seed), 20.0)).mean() / 255 * 72**2 for seed in range(60)]
    assert 200 < np.median(areas) < 4 * 20**2 and min(areas) > 0


def test_calibration_and_refit_see_the_collages():
    torch.manual_seed(0)
    dense, data = load_model(tiny_spec()), tiny_images()
    layers = []
    for collages in (0, 1):
        model = copy.deepcopy(dense)
        extract(model, data, method_options(**FAST, collages=collages))
        layers.append(model.blocks[0].mlp)
    assert not torch.equal(layers[0].router, layers[1].router)
    again = copy.deepcopy(dense)
    extract(again, data, method_options(**FAST, collages=1))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)), "deterministic"


@pytest.mark.parametrize("distil", ["output", "tokens"])
def test_distillation_pairs_each_collage_with_its_own_teacher(monkeypatch, distil):
    torch.manual_seed(0)
    dense, data = load_model(tiny_spec()), tiny_images(20)
    model = copy.deepcopy(dense)
    extract(model, data, method_options(**FAST))
    seen: dict[int, torch.Tensor] = {}
    real = Trainer._loss

    def checked(self, student, part, wanted, power, amp=True):
        with torch.no_grad():
            torch.testing.assert_close(dense(part.images), wanted.output, rtol=1e-4, atol=1e-4)
        assert (wanted.tokens is not None) == (distil == "tokens")
        seen.update(zip(part.indices.tolist(), part.images, strict=True))
        return real(self, student, part, wanted, power, amp)

    monkeypatch.setattr(Trainer, "_loss", checked)
    finetune(model, dense, data, FinetuneConfig(epochs=1, batch_size=7, augment=1, collages=2, validation=0.25, distil=distil))
    held_out = [i for i in range(20) if i in seen and i + 20 not in seen]
    assert len(held_out) == 5 and len(seen) == 20 + 15 + 40
    among = [i for i in range(20) if i not in held_out]
    made = Collages(data, model_transform(dense), 2, 0, among)
    for i in range(40):
        assert torch.equal(seen[40 + i], made.load(i))
