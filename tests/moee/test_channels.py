"""Images of one channel, of more than three, and of 16 bits."""

import numpy as np
import pytest
import torch
from PIL import Image

from moee.data.collage import Collages
from moee.data.image_set import TensorSet, batches
from moee.data.sources import load_data
from moee.data.transform import model_transform
from moee.data.views import Views
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.measure.metrics import dense_macs
from moee.methods.recipe import method_options
from moee.models.model import load_model
from tests.conftest import extract, tiny_spec


def transform_of(channels: int):
    return model_transform(load_model(tiny_spec(in_chans=channels)))


def test_mean_and_deviation_follow_the_channels():
    """Grey images get the average; further channels repeat red, green and blue, as timm repeats pretrained weights."""
    spec = tiny_spec(in_chans=5)
    model = load_model(spec)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.6), "std": (0.2, 0.3, 0.4)}
    assert model_transform(model).mean == (0.1, 0.2, 0.6, 0.1, 0.2)
    grey = load_model(tiny_spec(in_chans=1))
    grey.pretrained_cfg = {**grey.pretrained_cfg, "mean": (0.1, 0.2, 0.6), "std": (0.2, 0.3, 0.4)}
    transform = model_transform(grey)
    assert transform.mean == pytest.approx((0.3,)) and transform.std == pytest.approx((0.3,)) and transform.shape == (1, 32, 32)
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(transform.pixels(transform.normalise(x)[0]), x[0])


def test_a_grey_model_reads_files_as_grey(tmp_path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(colour).convert("L").save(tmp_path / "grey.png")
    data = load_data(str(tmp_path), transform_of(1))
    images = torch.stack([data.load(0), load_data(str(tmp_path), transform_of(1), "val").load(0)])
    assert images.shape == (2, 1, 32, 32) and torch.equal(images[0], images[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_built_in_sets_views_and_collages_have_the_models_channels(channels):
    transform = transform_of(channels)
    for source in ("digits", "photos:1", "photo-crops"):
        data = load_data(source, transform)
        for made in (data, Views(data, transform, 1, 0), Collages(data, transform, 1, 0)):
            assert made.load(1).shape == (channels, 32, 32)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey_levels_are_scaled_and_not_clipped(tmp_path, channels):
    levels = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode.startswith("I")
    data = load_data(str(tmp_path), transform_of(channels))
    expected = Image.fromarray((levels / 257).round().astype(np.uint8)).convert("L" if channels == 1 else "RGB")
    assert torch.equal(data.load(0), data.prepare(expected))
    assert 0.45 < data.transform.pixels(data.load(0)).mean() < 0.55


def test_levels_of_no_known_range_are_skipped_by_name(tmp_path, caplog):
    Image.fromarray(np.full((40, 40), 1000.0, np.float32)).save(tmp_path / "depth.tiff")
    Image.fromarray(np.full((40, 40), 1 << 20, np.int32)).save(tmp_path / "counts.tiff")
    for i in range(8):
        Image.new("RGB", (40, 40), (i, i, i)).save(tmp_path / f"{i}.png")
    both = [load_data(str(tmp_path), transform_of(3), split) for split in ("train", "val")]
    assert sum(len(batch.images) for data in both for batch in batches(data, 4)) == 8
    skipped = [name.rpartition("/")[2] for data in both for name in data.skipped.values()]
    assert sorted(skipped) == ["counts.tiff", "depth.tiff"]
    assert "levels from 1000 to 1000; expected 8 or 16 bits" in caplog.text


def test_five_channels_come_as_tensors_and_files_are_refused(tmp_path):
    spec = tiny_spec(in_chans=5)
    model = load_model(spec)
    transform = model_transform(model)
    for source in ("digits", "photos", "photo-crops", str(tmp_path), "wds/x"):
        with pytest.raises(UserError, match=r"5 channels, and files are read as grey \(1\) or RGB \(3\)"):
            load_data(source, transform)
    images = torch.randn(24, 5, 32, 32, generator=torch.Generator().manual_seed(0))
    assert transform.normalise(images).shape == images.shape
    assert dense_macs(model, (5, 32, 32)) == dense_macs(load_model(tiny_spec()), (3, 32, 32)) + 2 * 64 * 16 * 32
    config = method_options(clustering="kmeans", clusters=2, cluster_tokens=200, components=4, target_macs=0.9)
    extract(model, TensorSet("bands", images, [-1] * 24), config)
    assert routed_layers(model) and model(images[:2]).shape == (2, 10)
