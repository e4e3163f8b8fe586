"""Random views: where they come from, that they repeat, and who sees them."""

import copy
import random
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from moee.config import FinetuneConfig
from moee.data.sources import load_data
from moee.data.transform import Transform, model_transform
from moee.data.views import Joined, Views, widened
from moee.errors import UserError
from moee.methods.recipe import method_options
from moee.models.model import load_model
from moee.train.finetuning import finetune
from tests.conftest import extract, tiny_images, tiny_spec

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SMALL = Transform((3, 32, 32), MEAN, STD, {"mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.9})
FAST = dict(clustering="kmeans", clusters=3, cluster_tokens=300, keep=0.8)


@pytest.fixture
def folder(tmp_path):
    """Four classes of pictures, each of one colour, wider than high."""
    for colour in ("red", "green", "blue", "white"):
        for k in range(5):
            path = tmp_path / "images" / colour / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (90 + 10 * k, 60), colour).save(path)
    return tmp_path / "images"


def test_a_view_depends_on_seed_and_position_alone():
    data = tiny_images(6)
    views = Views(data, SMALL, 2, seed=0)
    assert len(views) == 12 and views.load(3).shape == (3, 32, 32)
    first = views.load(7)
    random.seed(99)
    torch.manual_seed(99)
    before = random.getstate(), torch.get_rng_state()
    assert torch.equal(views.load(7), first), "the same view again"
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1]), "drawing leaves the generators alone"
    assert not torch.equal(views.load(1), first), "another view of the same image"
    assert not torch.equal(Views(data, SMALL, 2, seed=1).load(7), first)


def test_views_are_drawn_from_the_stored_picture(folder):
    """Not from the centre crop: what lies beside it is seen too. The colour says which picture it was."""
    data = load_data(str(folder), SMALL, "train")
    views = Views(data, SMALL, 1, seed=0)
    compared = 0
    for i in range(len(data)):
        assert data.picture(i).size[0] >= 90
        brightest = SMALL.pixels(views.load(i)).mean((1, 2))
        wanted = SMALL.pixels(data.load(i)).mean((1, 2))
        if wanted.max() - wanted.min() > 0.3:  # white has no brightest channel
            assert brightest.argmax() == wanted.argmax()
            compared += 1
    assert compared > len(data) // 2


def test_photographs_give_views_of_the_whole_picture():
    data = load_data("photos:2", SMALL, "train")
    sizes = [data.picture(i).size for i in range(len(data))]
    assert sizes[0] == sizes[1] == (512, 512), "two crops of the first photograph"
    assert len(data) == 28 and sizes[-1] != sizes[0]


def test_shards_give_views(folder, tmp_path):
    pytest.importorskip("webdataset")
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "train-0.tar", "w") as archive:
        for i, path in enumerate(sorted(folder.rglob("*.png"))):
            archive.add(path, f"{i:04d}.png")
    data = load_data(f"wds/{tmp_path / 'tar'}", SMALL, "train")
    assert data.picture(0).size[1] == 60 and Views(data, SMALL, 1, 0).load(0).shape == (3, 32, 32)


def test_an_unreadable_image_has_no_views(folder):
    broken = load_data(str(folder), SMALL, "train").describe(3)
    Path(broken).write_bytes(b"no image")
    joined = widened(load_data(str(folder), SMALL, "train"), SMALL, 1, 0, 0)
    bad = [i for i in range(len(joined)) if isinstance(joined[i][1], str)]
    assert bad == [3, 3 + len(joined) // 2]
    assert all(broken in joined.describe(i) for i in bad)


def test_no_views_is_the_data_itself():
    data = tiny_images(6)
    assert widened(data, SMALL, 0, 0, 0) is data
    joined = widened(data, SMALL, 2, 0, 0)
    assert isinstance(joined, Joined) and len(joined) == 18
    assert torch.equal(joined.load(4), data.load(4)) and torch.equal(joined.load(6 + 9), Views(data, SMALL, 2, 0).load(9))


def test_only_the_refit_sees_the_views():
    """Experts, routers and kept neurons stay; the down projection is another."""
    torch.manual_seed(0)
    dense, data = load_model(tiny_spec()), tiny_images()
    layers = []
    for augment in (0, 1):
        model = copy.deepcopy(dense)
        extract(model, data, method_options(**FAST, augment=augment))
        layers.append(model.blocks[0].mlp)
    for name in ("router", "w_up", "neurons", "offsets"):
        assert torch.equal(getattr(layers[0], name), getattr(layers[1], name))
    assert not torch.equal(layers[0].w_down, layers[1].w_down)
    with pytest.raises(UserError, match="--augment is for the refit; compensation mean has none"):
        method_options(**FAST, augment=1, compensation="mean")


def test_distillation_on_views_pairs_each_with_its_own_teacher(monkeypatch):
    """Every output that the student is compared with is the dense model's on just that image; no view of a held-out image."""
    from moee.train import step as training

    torch.manual_seed(0)
    dense, data = load_model(tiny_spec()), tiny_images(20)
    model = copy.deepcopy(dense)
    extract(model, data, method_options(**FAST))
    seen = set()
    real = training.Trainer._loss

    def checked(self, student, part, wanted, power, amp=True):
        with torch.no_grad():
            torch.testing.assert_close(dense(part.images), self.teacher[part.indices], rtol=1e-4, atol=1e-4)
        seen.update(part.indices.tolist())
        return real(self, student, part, wanted, power, amp)

    monkeypatch.setattr(training.Trainer, "_loss", checked)
    finetune(model, dense, data, FinetuneConfig(epochs=1, batch_size=7, augment=2, validation=0.25))
    held_out = {i for i in range(20) if i in seen and i + 20 not in seen}
    assert len(seen) == 20 + 2 * 15 and len(held_out) == 5 and not held_out & {i % 20 for i in seen if i >= 20}


@pytest.mark.parametrize("augment", [0, 1])
def test_distillation_refuses_an_unreadable_image(folder, augment):
    """Its teacher's outputs would stand at other images' positions."""
    dense = load_model(tiny_spec())
    Path(load_data(str(folder), SMALL, "train").describe(3)).write_bytes(b"no image")
    with pytest.raises(UserError, match="fine-tuning needs readable images; 1 of"):
        finetune(copy.deepcopy(dense), dense, load_data(str(folder), SMALL, "train"), FinetuneConfig(epochs=1, augment=augment))


def test_the_transform_of_a_model_draws_views():
    model = load_model(tiny_spec())
    transform = model_transform(model)
    assert Views(tiny_images(2), transform, 1, 0).load(0).shape == (3, 32, 32)
