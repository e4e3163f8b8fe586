"""WebDataset shards: the images that timm's own reader yields, counted exactly, in parts that fit together."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import timm.data
import torch
from PIL import Image

from moee.data.image_set import batches
from moee.data.sources import load_data, load_splits
from moee.data.transform import model_transform
from moee.errors import MissingDependency, UserError
from moee.models.model import load_model
from moee.parallel.group import Group
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


def write_classes(root, **splits):
    """One shard a split; each image has the class that is listed, None for no `.cls` at all."""
    root.mkdir()
    for split, labels in splits.items():
        with tarfile.open(root / f"{split}-0.tar", "w") as archive:
            for i, label in enumerate(labels):
                add(archive, f"{i:05d}.png", png(i))
                if label is not None:
                    add(archive, f"{i:05d}.cls", str(label).encode())
    return f"wds/{root}"


@pytest.mark.parametrize("missing", range(3))
def test_a_class_that_val_lacks_shifts_nothing(tmp_path, transform, missing):
    pytest.importorskip("webdataset", reason="the extra `stream`")
    fewer = [label for label in (0, 1, 2) if label != missing]
    train, val = load_splits(write_classes(tmp_path / "s", train=[0, 1, 2, 2], val=fewer), transform, head_classes=3)
    assert train.classes == val.classes == ("0", "1", "2") and train.labels == [0, 1, 2, 2] and val.labels == fewer
    train, val = load_splits(write_classes(tmp_path / "t", train=fewer, val=[0, 1, 2]), transform, head_classes=3)
    assert val.labels == [0, 1, 2] and train.labels == fewer


def test_class_numbers_of_shards(tmp_path, transform):
    """From 1, with gaps, some that are none: numbers are names, so a head of as many classes, or larger, is served."""
    pytest.importorskip("webdataset", reason="the extra `stream`")
    train, val = load_splits(write_classes(tmp_path / "one", train=[1, 2, 3], val=[3, 1]), transform, head_classes=3)
    assert train.classes == ("1", "2", "3") and val.labels == [2, 0]
    train, val = load_splits(write_classes(tmp_path / "gaps", train=[7, 42, 7], val=[42]), transform, head_classes=1000)
    assert val.num_classes == 1000 and val.labels == [42] and any("names are numbers" in note for note in val.notes)
    train, val = load_splits(write_classes(tmp_path / "odd", train=[0, None, "x", 9**15, 1], val=[0]), transform)
    assert train.labels == [0, -1, -1, -1, 1] and train.summary("train").endswith("3 without a label")
    source = write_classes(tmp_path / "named", train=[0, 1], val=[1, 0, 5])
    val = load_data(source, transform, "val", classes=("cat", "dog"))
    assert val.classes == ("cat", "dog") and val.labels == [1, 0, -1]
    assert any("taken as positions in the model's 2 classes" in note for note in val.notes)


def test_a_shard_in_both_splits_is_refused(root, transform):
    (root / "_info.json").unlink()
    os.link(root / "train-0001.tar", root / "val-9.tar")
    with pytest.raises(UserError, match="train-0001.tar and .*val-9.tar are one file"):
        load_data(f"wds/{root}", transform)


def test_an_image_that_would_fill_the_memory_is_skipped(tmp_path, transform):
    pytest.importorskip("webdataset", reason="the extra `stream`")
    buffer = io.BytesIO()
    Image.new("RGB", (200_000, 1)).save(buffer, "PNG")
    (tmp_path / "s").mkdir()
    for split in ("train", "val"):
        with tarfile.open(tmp_path / "s" / f"{split}-0.tar", "w") as archive:
            add(archive, "0.png", png(0))
            add(archive, "1.png", buffer.getvalue())
    data = load_data(f"wds/{tmp_path / 's'}", transform)
    assert sum(len(b.images) for b in batches(data, 2)) == 1 and "train-0.tar, byte" in data.skipped[1]


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


def renamed(source, *names):
    root = Path(source.removeprefix("wds/"))
    parts = [path.rename(root / f"{i}.part") for i, path in enumerate(sorted(root.glob("*.tar")))]
    for path, name in zip(parts, names, strict=True):
        path.rename(root / f"{name}.tar")
    return source


@pytest.mark.parametrize(
    ("train", "held_out"), [("flowers-train-000", "flowers-val-000"), ("trn0", "eval0"), ("train-0", "holdout-0")]
)
def test_shards_are_told_apart_by_words_of_their_names(tmp_path, transform, train, held_out):
    source = renamed(write_classes(tmp_path / "s", train=[0, 1, 2, 2], val=[0, 1]), train, held_out)
    assert [len(data) for data in load_splits(source, transform)] == [4, 2]


@pytest.mark.parametrize(("one", "other"), [("train-0", "more-0"), ("val-0", "test-0"), ("a", "holdout")])
def test_shards_that_cannot_be_told_apart_are_refused(tmp_path, transform, one, other):
    source = renamed(write_classes(tmp_path / "s", train=[0, 1, 2, 2], val=[0, 1]), one, other)
    with pytest.raises(UserError, match=f"holds .*'{one}'.*call the shards train-.* and val-"):
        load_splits(source, transform)


def test_shards_of_neither_split_are_named(tmp_path, transform):
    source = write_classes(tmp_path / "s", train=[0, 1, 2, 2], val=[0, 1], test=[0])
    train, val = load_splits(source, transform)
    assert (len(train), len(val)) == (4, 2) and any("not read ('test-" in note for note in val.notes)


def write_members(root, **members):
    """Two shards of two images each; each image has these further members."""
    root.mkdir()
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}-0.tar", "w") as archive:
            for i in range(2):
                add(archive, f"{i:05d}.png", png(i + 2 * (split == "val")))
                for extension, text in members.items():
                    add(archive, f"{i:05d}.{extension}", text.encode())
    return f"wds/{root}"


@pytest.mark.parametrize(
    ("members", "said"),
    [({"cls": "ant"}, "2 images of train have no label: their .cls holds no number from 0 to 2147483647 (first: 'ant')"),
     ({"cls": "1" * 40}, "their .cls holds no number from 0 to 2147483647 (first: more than 32 bytes)"),
     ({"cls": "-1"}, "(first: '-1')"), ({"cls": ""}, "(first: '')"),
     ({"txt": "3"}, "2 images of val have no label: labels are read from members .cls, which hold a number, and these have other "
      "members (first: .txt)")],
)  # fmt: skip
def test_why_images_have_no_label_is_said(tmp_path, transform, members, said):
    pytest.importorskip("webdataset", reason="the extra `stream`")
    train, val = load_splits(write_members(tmp_path / "s", **members), transform)
    assert train.summary("train") == "train: 2 images, unlabelled"
    assert any(said in note for note in val.notes), val.notes


def test_images_that_stand_alone_and_labelled_ones_need_no_word(tmp_path, transform):
    pytest.importorskip("webdataset", reason="the extra `stream`")
    for name, members in (("alone", {}), ("labelled", {"cls": "1", "json": "{}"})):
        train, _ = load_splits(write_members(tmp_path / name, **members), transform)
        assert train.notes == (), name


def test_timms_reader_keeps_quiet_about_a_file_that_no_set_needs(tmp_path, transform, caplog):
    pytest.importorskip("webdataset", reason="the extra `stream`")
    load_splits(write_classes(tmp_path / "s", train=[0, 1], val=[1]), transform)
    assert not [record for record in caplog.records if record.name.startswith("timm")]


def test_copies_in_other_shards_are_counted(tmp_path, transform):
    """Of the same images in both splits, of a set that is divided, and of none."""
    pytest.importorskip("webdataset", reason="the extra `stream`")
    train, _ = load_splits(write_classes(tmp_path / "s", train=[0, 1, 2, 2], val=[0, 1]), transform)
    assert any("2 of the 2 held-out images are copies of training images, byte for byte" in note for note in train.notes)
    for name, values, said in (("twice", [*range(8), *range(8)], True), ("once", range(16), False)):
        (tmp_path / name).mkdir()
        for shard in range(2):
            with tarfile.open(tmp_path / name / f"{shard}.tar", "w") as archive:
                for i, value in enumerate(values[8 * shard : 8 * shard + 8]):
                    add(archive, f"{i:05d}.png", png(value))
        _, val = load_splits(f"wds/{tmp_path / name}", transform)
        assert any("copies of training images" in note for note in val.notes) == said
