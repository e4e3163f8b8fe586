"""WebDataset shards: the images that timm's own reader yields, counted exactly, in parts that fit together."""

import io
import json
import tarfile

import pytest
import timm.data
import torch
from PIL import Image

from moee.data import batches, load_data, model_transform
from moee.distributed import Group
from moee.errors import MissingDependency, UserError
from moee.models import load_model
from tests.conftest import tiny_spec

LENGTHS = {"train": (5, 3, 4), "validation": (2, 3)}


def add(archive, name, raw):
    item = tarfile.TarInfo(name)
    item.size = len(raw)
    archive.addfile(item, io.BytesIO(raw))


def png(value, size=40):
    picture = Image.new("RGB", (size, size), (value * 12 % 256, value * 5 % 256, 90))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(root, info=True):
    root.mkdir()
    described, value = {}, 0
    for split, lengths in LENGTHS.items():
        names = [f"{split}-{i:04d}.tar" for i in range(len(lengths))]
        for name, length in zip(names, lengths, strict=True):
            with tarfile.open(root / name, "w") as archive:
                for _ in range(length):
                    add(archive, f"a.b/{value:05d}.json", b"{}")
                    add(archive, f"a.b/{value:05d}.png", png(value))
                    add(archive, f"a.b/{value:05d}.cls", str(value % 3).encode())
                    value += 1
        described[split] = {
            "name": split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": list(lengths)
        }  # fmt: skip
    if info:
        (root / "_info.json").write_text(json.dumps({"splits": described}))
    return root


@pytest.fixture(scope="module")
def transform():
    return model_transform(load_model(tiny_spec()))


@pytest.fixture
def root(tmp_path):
    pytest.importorskip("webdataset", reason="timm's wds reader needs webdataset (the extra `stream`, part of `dev`)")
    return write_shards(tmp_path / "shards")


@pytest.mark.parametrize(("split", "name"), [("train", "train"), ("val", "validation")])
def test_the_images_are_those_of_timms_reader(root, transform, split, name):
    data = load_data(f"wds/{root}", transform, split)
    theirs = timm.data.create_dataset("wds/", root=str(root), split=name)
    theirs.transform = data.prepare
    expected = list(theirs)
    assert len(data) == len(expected) == sum(LENGTHS[name]) and data.num_classes == 3
    for (index, image, label), (wanted, target) in zip((data[i] for i in range(len(data))), expected, strict=True):
        assert torch.equal(image, wanted) and label == target, index


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_see_every_image_once(root, transform, world):
    data = load_data(f"wds/{root}", transform)
    parts = [Group(rank=r, world=world).part(len(data), 2) for r in range(world)]
    seen = [int(i) for p in parts for b in batches(data, 2, order=torch.arange(p.start, p.stop), strict=False) for i in b.indices]
    assert seen == list(range(12))


def test_processes_that_read_ahead_change_nothing(root, transform):
    data, ahead = (load_data(f"wds/{root}", transform) for _ in range(2))
    ahead.workers = 2
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for a, b in zip(batches(data, 5, order=order), batches(ahead, 5, order=order), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices) and torch.equal(a.labels, b.labels)


def test_without_info_the_names_divide(tmp_path, transform):
    pytest.importorskip("webdataset", reason="the extra `stream`")
    named = write_shards(tmp_path / "named", info=False)
    assert [len(load_data(f"wds/{named}", transform, s)) for s in ("train", "val")] == [12, 5]
    for path in list(named.glob("validation*")):
        path.unlink()
    train, held_out = (load_data(f"wds/{named}", transform, s) for s in ("train", "val"))
    assert len(train) == 10 and len(held_out) == 2
    places = {tuple(place) for data in (train, held_out) for place in data.places.tolist()}
    assert len(places) == 12, "the parts must not overlap"


def test_damage_is_named(root, transform):
    def info(change):
        body = json.loads((root / "_info.json").read_text())
        change(body["splits"]["train"])
        (root / "_info.json").write_text(json.dumps(body))

    info(lambda split: split["shard_lengths"].__setitem__(1, 4))
    with pytest.raises(UserError, match="train-0001.tar holds 3 images, _info.json says 4"):
        load_data(f"wds/{root}", transform)
    info(lambda split: split["filenames"].__setitem__(1, "../train-0001.tar"))
    with pytest.raises(UserError, match="leaves its folder"):
        load_data(f"wds/{root}", transform)
    info(lambda split: split.update(filenames=["train-0000.tar"], shard_lengths=[5], num_samples=5))
    path = root / "train-0000.tar"
    raw = bytearray(path.read_bytes())
    place = load_data(f"wds/{root}", transform).places[1, 1]
    raw[place : place + 8] = b"\0" * 8
    path.write_bytes(raw)
    data = load_data(f"wds/{root}", transform)
    assert sum(len(b.images) for b in batches(data, 2)) == 4 and list(data.skipped) == [1]
    path.write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match="not a readable tar file"):
        load_data(f"wds/{root}", transform)


def test_a_missing_package_is_named(tmp_path, transform, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "webdataset" else real(name))
    write_shards(tmp_path / "shards")
    with pytest.raises(MissingDependency, match=r"pip install 'moee\[stream\]'"):
        load_data(f"wds/{tmp_path / 'shards'}", transform)
    with pytest.raises(UserError, match="is not a folder"):
        load_data("wds/nowhere", transform)
