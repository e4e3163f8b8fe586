"""Loading models, finding MLPs, opening data: what works and what is refused in one sentence."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from moee.data import built_in
from moee.data.image_set import batches
from moee.data.sources import load_data, load_splits
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.mlps.find import find_ffns
from moee.models.model import ModelSpec, load_model
from tests.conftest import TINY, tiny_spec


def spec(name, **kwargs):
    return ModelSpec(name=name, timm_name=name, kwargs=kwargs, random_seed=0)


@pytest.mark.parametrize(
    ("name", "kwargs", "count", "activation"),
    [
        ("vit_tiny_patch16_224", dict(depth=2), 2, "gelu"),
        ("deit_tiny_distilled_patch16_224", dict(depth=2), 2, "gelu"),
        ("swin_tiny_patch4_window7_224", dict(), 12, "gelu"),
        ("convnext_tiny", dict(depths=(1, 1, 1, 1), dims=(16, 32, 64, 128)), 4, "gelu"),
        ("convnext_atto", dict(conv_mlp=True), 12, "gelu"),
        ("vit_small_patch14_dinov2", dict(depth=2, img_size=28), 2, "gelu"),
    ],
)
def test_finds_the_mlps_of_many_architectures(name, kwargs, count, activation):
    model = load_model(spec(name, **kwargs))
    ffns = find_ffns(model).ffns
    assert len(ffns) == count and {f.activation for f in ffns} == {activation}
    for ffn in ffns:
        assert ffn.w_up.shape == (ffn.hidden, ffn.dim) and ffn.w_down.shape == (ffn.dim, ffn.hidden)
        assert ffn.channels_first == bool(kwargs.get("conv_mlp"))


def test_layer_scale_is_found():
    assert find_ffns(load_model(spec("vit_small_patch14_dinov2", depth=2, img_size=28))).ffns[0].scale.shape == (384,)
    assert find_ffns(load_model(spec("convnext_atto"))).ffns[0].scale.shape == (40,)
    assert find_ffns(load_model(tiny_spec())).ffns[0].scale is None


def test_exclude():
    model = load_model(tiny_spec())
    assert [f.name for f in find_ffns(model, ("blocks.1",)).ffns] == ["blocks.0.mlp", "blocks.2.mlp"]
    with pytest.raises(UserError, match="--exclude blocks.7 matches no MLP"):
        find_ffns(model, ("blocks.7",))
    with pytest.raises(UserError, match="no fc1-act-fc2 MLP"):
        find_ffns(load_model(spec("resnet10t")))


def test_unknown_model_suggests_a_name():
    with pytest.raises(UserError, match="did you mean .*deit_small_patch16_224"):
        load_model(spec("deit_smal_patch16_224"))


def test_refused_arguments():
    with pytest.raises(UserError, match="refused the arguments"):
        load_model(spec("vit_tiny_patch16_224", nonsense=1))


def test_weights_roundtrip_and_refusals(tmp_path):
    model = load_model(tiny_spec())
    path = tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)

    def load(name):
        return load_model(tiny_spec().model_copy(update={"weights": str(tmp_path / name), "random_seed": None}))

    again = load("w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not valid safetensors"):
        load("cut.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    assert torch.equal(load("w.pth").head.weight, model.head.weight)
    torch.save(model.state_dict(), tmp_path / "disguised.safetensors")
    with pytest.raises(UserError, match="not valid safetensors"):
        load("disguised.safetensors")
    with pytest.raises(UserError, match="not found"):
        load("absent.safetensors")
    save_file({"something.else": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="belongs to another model"):
        load("foreign.safetensors")
    other = load_model(ModelSpec(name="o", timm_name="vit_tiny_patch16_224", kwargs={**TINY, "embed_dim": 48}, random_seed=0))
    save_file(other.state_dict(), tmp_path / "wider.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        load("wider.safetensors")
    state = model.state_dict()
    del state["blocks.1.mlp.fc1.weight"]
    save_file(state, tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match="1 tensors missing.*blocks.1.mlp.fc1.weight"):
        load("missing.safetensors")


def test_digits_and_photos():
    transform = model_transform(load_model(tiny_spec()))
    assert transform.shape == (3, 32, 32)
    train, held_out = load_data("digits", transform, "train"), load_data("digits", transform, "val")
    assert (len(train), len(held_out)) == (1078, 719) and train.labelled
    assert train.images.shape[1:] == (3, 32, 32)
    photos, photos_out = load_data("photos", transform, "train"), load_data("photos", transform, "val")
    assert (len(photos), len(photos_out)) == (308, 96) and not photos.labelled
    assert len(load_data("photos:3", transform, "train")) == 42
    assert torch.equal(photos.images, load_data("photos", transform, "train").images)
    for wrong in ("photos:x", "photos:0", "photos:1001", "photo-crops:-1", "photo-crops:"):
        with pytest.raises(UserError, match="crops a photograph, from 1 to 1000, for example photo"):
            load_data(wrong, transform)


def test_held_out_crops_may_be_more_and_training_crops_stay_as_they_are():
    transform = model_transform(load_model(tiny_spec()))
    usual, more = ({s: load_data(name, transform, s) for s in ("train", "val")} for name in ("photo-crops", "photo-crops:35"))
    assert len(usual["val"]) == 400 and len(more["val"]) == 700 and max(Counter(more["val"].labels).values()) == 35
    assert len(more["train"]) == 800 and torch.equal(more["train"].load(5), usual["train"].load(5))


def test_photo_crops_are_labelled_by_their_photograph():
    transform = model_transform(load_model(tiny_spec()))
    train, held_out = load_splits("photo-crops", transform, seed=0)
    assert train.counts() == dict.fromkeys(train.classes, 40) and held_out.counts() == dict.fromkeys(train.classes, 20)
    assert train.classes == held_out.classes and len(train.classes) == 20 and "astronaut" in train.classes
    again = load_data("photo-crops", transform, "train", seed=7)
    assert torch.equal(train.load(5), again.load(5)) and not torch.equal(train.load(5), train.load(6))
    assert train.load(0).shape == (3, 32, 32) and train.describe(0) == "photo-crops[0]"


@pytest.mark.parametrize("size", [(300, 100), (90, 400), (37, 37)])
def test_photo_crops_for_training_show_no_pixel_of_held_out_ones(monkeypatch, size):
    width, height = size
    columns = np.where(np.arange(width) < round(0.6 * width), 0, 255).astype(np.uint8)
    drawn = Image.fromarray(np.tile(columns[None, :, None], (height, 1, 3)))
    monkeypatch.setattr(built_in, "photo", lambda name: drawn)
    transform = model_transform(load_model(tiny_spec(img_size=(32, 48))))
    train, held_out = load_splits("photo-crops", transform)
    for data, level in ((train, 0), (held_out, 1)):
        for index in range(len(data)):
            assert torch.allclose(transform.pixels(data.load(index)), torch.tensor(float(level)), atol=1e-6)
            assert set(data.picture(index).tobytes()) == {255 * level}


def write_images(folder, count, seed=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def test_image_folders(tmp_path):
    transform = model_transform(load_model(tiny_spec()))
    write_images(tmp_path / "flat", 10)
    train, held_out = (load_data(str(tmp_path / "flat"), transform, s) for s in ("train", "val"))
    assert (len(train), len(held_out)) == (8, 2) and not train.labelled
    assert not set(train.paths) & set(held_out.paths)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write_images(tmp_path / "divided" / split / name, 3)
    divided = load_data(str(tmp_path / "divided"), transform, "val")
    assert divided.labelled and divided.labels == [0, 0, 0, 1, 1, 1]
    assert next(batches(divided, 6)).images.shape == (6, 3, 32, 32)


def test_bad_folders(tmp_path):
    transform = model_transform(load_model(tiny_spec()))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images found"):
        load_data(str(tmp_path / "empty"), transform)
    with pytest.raises(UserError, match="expected digits, photos, photo-crops, an image folder"):
        load_data(str(tmp_path / "absent"), transform)
    write_images(tmp_path / "mixed", 5)
    (tmp_path / "mixed" / "1.png").write_bytes(b"not an image")
    mixed = load_data(str(tmp_path / "mixed"), transform)
    read = sum(len(b.images) for b in batches(mixed, 2))
    assert read == len(mixed) - len(mixed.skipped) and len(mixed.skipped) <= 1
    (tmp_path / "broken").mkdir()
    for i in range(5):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="none of the 4 images .* could be read"):
        list(batches(load_data(str(tmp_path / "broken"), transform), 2))
