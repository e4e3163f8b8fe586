"""Image folders: every layout gives the labels of the names, and every image once."""

import logging
import os
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from moee.data.image_set import batches, say_read, skipped_line
from moee.data.sources import load_data, load_splits
from moee.data.transform import Transform
from moee.data.views import widened
from moee.errors import UserError

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SMALL = Transform((3, 32, 32), MEAN, STD, {"mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.9})
NAMES = ("ant", "bee", "cat", "dog")


def add(folder, count=3, start=0):
    """Images that differ, by their place in the data set."""
    folder.mkdir(parents=True, exist_ok=True)
    split = zlib.crc32(folder.parent.name.encode()) % 256
    for i in range(start, start + count):
        Image.new("RGB", (40, 36), (i * 7 % 256, len(folder.name) * 9 % 256, split)).save(folder / f"{i}.png")


def tree(root, train=NAMES, val=NAMES):
    for split, names in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        for position, name in enumerate(names):
            add(root / split / name, 3 + position % 2 if split == "train" else 2)
    return root


def named(data):
    """Class folder of every image, as its path has it, and as its label says."""
    return [
        (os.path.relpath(path, data.name).split(os.sep)[-2:][0], data.classes[label] if label >= 0 else None)
        for path, label in zip(data.paths, data.labels, strict=True)
    ]


@pytest.mark.parametrize("missing", range(4))
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("empty", [False, True])
def test_a_class_that_a_split_lacks_shifts_nothing(tmp_path, missing, split, empty):
    """Whether its folder lacks or is empty, in either split."""
    fewer = [name for position, name in enumerate(NAMES) if position != missing]
    root = tree(tmp_path / "d", **{split: fewer})
    if empty:
        (root / split / NAMES[missing]).mkdir()
    train, val = load_splits(str(root), SMALL, head_classes=4)
    assert train.classes == val.classes == NAMES
    assert all(folder == name for data in (train, val) for folder, name in named(data))
    assert f"3 classes (no '{NAMES[missing]}')" in (train if split == "train" else val).summary(split)
    assert load_data(str(root), SMALL, "val", head_classes=4).labels == val.labels
    only_val = any("only val has images of" in note for note in val.notes)
    assert only_val == (split == "train")


def test_a_class_that_only_val_has_is_unlabelled_without_a_head(tmp_path):
    train, val = load_splits(str(tree(tmp_path / "d", train=NAMES[:2] + NAMES[3:])), SMALL)
    assert train.classes == val.classes == ("ant", "bee", "dog")
    assert [name for folder, name in named(val) if folder == "cat"] == [None, None]
    assert any("'cat' is in val alone: 2 images of val have no label" in note for note in val.notes)
    assert val.summary("val") == "val: 8 images, 3 classes, 2 without a label"


def test_an_artifacts_classes_number_the_labels(tmp_path):
    root = tree(tmp_path / "d", train=("bee", "cat"), val=("bee", "cat", "wasp"))
    val = load_data(str(root), SMALL, "val", classes=("cat", "ant", "bee"))
    assert val.classes == ("cat", "ant", "bee") and val.labels == [2, 2, 0, 0, -1, -1]
    assert val.notes == ("'wasp' is none of the model's 3 classes: 2 images of val have no label",)
    assert "2 classes (no 'ant')" in val.summary("val")


def test_two_classes(tmp_path):
    train, val = load_splits(str(tree(tmp_path / "d", NAMES[:2], NAMES[:2])), SMALL, head_classes=2)
    assert train.labelled and val.labels == [0, 0, 1, 1]


def test_one_class_says_nothing(tmp_path):
    train, val = load_splits(str(tree(tmp_path / "d", NAMES[:1], NAMES[:1])), SMALL)
    assert not train.labelled and set(val.labels) == {-1} and val.summary("val") == "val: 2 images, unlabelled"


@pytest.mark.parametrize("where", ["train", "val"])
def test_stray_images_are_no_class(tmp_path, where):
    root = tree(tmp_path / "d")
    add(root / where, 1)
    train, val = load_splits(str(root), SMALL, head_classes=4)
    assert train.classes == NAMES
    stray = (train if where == "train" else val).labels
    assert stray.count(-1) == 1 and (val if where == "train" else train).labels.count(-1) == 0
    assert any(f"1 image of {where} beside the class folders has no label" in note for note in val.notes)


def test_numbers_count(tmp_path):
    train, val = load_splits(str(tree(tmp_path / "d", ("10", "2", "1"), ("10", "2"))), SMALL, head_classes=3)
    assert train.classes == val.classes == ("1", "2", "10") and val.labels == [1, 1, 2, 2]


def test_names_of_any_script(tmp_path):
    names = ("[red] fox", "日本", "naïve; a,b", "n01440764")
    root = tree(tmp_path / "d", names, names[1:])
    train, val = load_splits(str(root), SMALL, head_classes=4)
    assert sorted(train.classes) == sorted(names)
    assert all(folder == name for data in (train, val) for folder, name in named(data))


def test_names_that_print_nothing_are_spelt_out(tmp_path):
    root = tree(tmp_path / "d", ("a\nb", "c"), ("c",))
    os.mkdir(os.fsencode(root / "val") + b"/caf\xe9")
    add(root / "new", 1)
    os.rename(root / "new" / "0.png", os.fsencode(root / "val") + b"/caf\xe9/0.png")
    train, val = load_splits(str(root), SMALL, head_classes=3)
    assert train.classes == ("a\\nb", "c", "caf\\udce9") and sorted(set(val.labels)) == [1, 2]
    assert next(batches(val, 8)).images.shape[0] == 3


def test_flat_folders_are_numbered_over_everything(tmp_path):
    for name in NAMES:
        add(tmp_path / "d" / name, 4)
    add(tmp_path / "d", 1)
    for hidden in (".git", ".ipynb_checkpoints", "__MACOSX"):
        add(tmp_path / "d" / hidden, 2)
    train, val = load_splits(str(tmp_path / "d"), SMALL, head_classes=4)
    assert len(train) + len(val) == 17 and train.classes == NAMES and not set(train.paths) & set(val.paths)
    labelled = [(folder, name) for data in (train, val) for folder, name in named(data) if name is not None]
    assert len(labelled) == 16 and all(folder == name for folder, name in labelled)


def test_the_class_is_the_folder_below_the_split(tmp_path):
    root = tmp_path / "d"
    for split in ("train", "val"):
        for deep in ("cat/persian", "cat/siamese", "dog/boxer"):
            add(root / split / deep, 2)
    train, val = load_splits(str(root), SMALL, head_classes=2)
    assert train.classes == ("cat", "dog") and val.labels == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("wrapper", ["images", "train", "archive/data"])
def test_one_folder_around_everything_is_no_class(tmp_path, wrapper):
    for name in NAMES:
        add(tmp_path / "d" / wrapper / name, 4)
    train, val = load_splits(str(tmp_path / "d"), SMALL)
    assert train.classes == NAMES and any("the folders below it are the classes" in note for note in val.notes)
    assert all(folder == name for data in (train, val) for folder, name in named(data))


@pytest.mark.parametrize("split", ["", "val"])
def test_an_image_beside_that_folder_takes_no_labels_away(tmp_path, split):
    for name in NAMES:
        add(tmp_path / "d" / split / "images" / name, 4)
        if split:
            add(tmp_path / "d" / "train" / name, 4)
    add(tmp_path / "d" / split, 1)
    train, val = load_splits(str(tmp_path / "d"), SMALL, classes=NAMES)
    assert -1 not in train.labels + val.labels and len(val) == (16 if split else 3)
    assert any("1 image beside it is left out" in n or "but 1 image, which is left out" in n for n in val.notes)


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "car", "train"):
        add(tmp_path / "d" / name, 4)
    assert load_data(str(tmp_path / "d"), SMALL).classes == ("bus", "car", "train")


# --- links ---


def test_loops_add_no_image_and_end(tmp_path):
    root = tree(tmp_path / "d")
    before = [data.paths for data in load_splits(str(root), SMALL)]
    (root / "train" / "cat" / "up").symlink_to(root)
    (root / "train" / "dog" / "again").symlink_to(root / "train")
    (root / "val" / "ant" / "up").symlink_to(root / "val")
    (root / "val" / "bee" / "far").symlink_to("/")
    (root / "val" / "bee" / "self").symlink_to(root / "val" / "bee" / "self")
    (root / "train" / "ant" / "peer").symlink_to(root / "train" / "bee")
    (root / "train" / "bee" / "peer").symlink_to(root / "train" / "ant")
    train, val = load_splits(str(root), SMALL)
    assert [train.paths, val.paths] == before
    assert any("links that lead back up were not followed" in note for note in val.notes)


def test_links_are_followed_once(tmp_path):
    root = tree(tmp_path / "d", NAMES[:2], NAMES)
    add(tmp_path / "elsewhere", 3)
    (root / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "dog").symlink_to(tmp_path / "elsewhere")
    train, val = load_splits(str(root), SMALL)
    assert train.counts() == {"ant": 3, "bee": 4, "cat": 3}
    assert any("dog leads to" in note and "which is read there" in note for note in val.notes)


def test_a_link_takes_no_folder_from_its_own_place(tmp_path):
    """train/aaa comes first in every order, and leads to held-out images."""
    root = tree(tmp_path / "d")
    (root / "train" / "aaa").symlink_to(root / "val" / "cat")
    train, val = load_splits(str(root), SMALL, head_classes=4)
    assert len(val) == 8 and train.classes == NAMES and "aaa" not in {folder for folder, _ in named(train)}


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_in_both_splits_is_not_trained_on(tmp_path, link):
    root = tree(tmp_path / "d")
    link(root / "train" / "cat" / "0.png", root / "val" / "cat" / "copy.png")
    train, val = load_splits(str(root), SMALL)
    assert len(val) == 9 and not any(path.endswith("train/cat/0.png") for path in train.paths)
    real = [{os.path.realpath(path) for path in data.paths} for data in (train, val)]
    inodes = [{os.stat(path).st_ino for path in data.paths} for data in (train, val)]
    assert not real[0] & real[1] and not inodes[0] & inodes[1]
    assert any("1 image in both train and val, under whatever name, is not trained on" in note for note in val.notes)


def test_copies_of_training_images_that_are_held_out_are_counted(tmp_path, monkeypatch):
    root = tree(tmp_path / "d")
    assert not any("byte for byte" in note for note in load_splits(str(root), SMALL)[0].notes)
    shutil.copy(root / "train" / NAMES[0] / "1.png", root / "val" / NAMES[1] / "other.png")
    train, val = load_splits(str(root), SMALL)
    said = f"1 of the {len(val)} held-out images is a copy of training images, byte for byte"
    assert any(said in note for note in train.notes)
    shutil.rmtree(root / "val")
    shutil.copytree(root / "train", root / "val")
    monkeypatch.setattr("moee.data.leaks.LOOKED", 2)
    assert any("2 of 2 compared held-out images are copies" in note for note in load_splits(str(root), SMALL)[0].notes)


def test_a_flat_folder_holds_every_file_once(tmp_path):
    for name in NAMES:
        add(tmp_path / "d" / name, 5)
    os.link(tmp_path / "d" / "ant" / "0.png", tmp_path / "d" / "bee" / "copy.png")
    train, val = load_splits(str(tmp_path / "d"), SMALL)
    assert len(train) + len(val) == 20 and any("1 image under a second name" in note for note in val.notes)


@pytest.mark.parametrize("link", [os.link, os.symlink])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_holds_every_file_once(tmp_path, split, link):
    """Twice in a split it would count twice in an accuracy, and narrow its interval."""
    root = tree(tmp_path / "d")
    counts = [len(data) for data in load_splits(str(root), SMALL)]
    link(root / split / "ant" / "0.png", root / split / "ant" / "again.png")
    train, val = load_splits(str(root), SMALL)
    assert [len(train), len(val)] == counts and any("1 image under a second name" in note for note in val.notes)


def test_a_link_takes_no_file_from_the_class_in_whose_folder_it_lies(tmp_path):
    """The first of the names stayed: a link in "ant" to an image of "bee" made an ant of it."""
    root = tree(tmp_path / "d")
    (root / "val" / "ant" / "aa.png").symlink_to(root / "val" / "bee" / "0.png")
    before = load_splits(str(tree(tmp_path / "e")), SMALL)[1]
    val = load_splits(str(root), SMALL)[1]
    assert val.labels == before.labels and val.counts() == before.counts()
    said = "1 image under a second name was left out (ant/aa.png); 1 image of them in another folder, which may be of another"
    assert any(said in note for note in val.notes)


def test_copies_in_a_folder_without_splits_are_counted(tmp_path):
    for name in ("a", "bb", "ccc", "dddd"):
        add(tmp_path / "d" / name, 5)
    assert not any("byte for byte" in note for note in load_splits(str(tmp_path / "d"), SMALL)[0].notes)
    for path in list((tmp_path / "d").rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    train, val = load_splits(str(tmp_path / "d"), SMALL)
    trained = {open(path, "rb").read() for path in train.paths}
    both = sum(open(path, "rb").read() in trained for path in val.paths)
    assert both > 1 and any(f"{both} of the {len(val)} held-out images are copies of training" in note for note in val.notes)


def test_val_that_is_train_is_refused(tmp_path):
    root = tree(tmp_path / "d", val=())
    (root / "val").rmdir()
    (root / "val").symlink_to(root / "train")
    with pytest.raises(UserError, match="no images found in .*val .*leads to .*train"):
        load_splits(str(root), SMALL)
    (root / "val").unlink()
    for path in sorted((root / "train").rglob("*.png")):
        (root / "val" / path.parent.name).mkdir(parents=True, exist_ok=True)
        os.link(path, root / "val" / path.parent.name / path.name)
    with pytest.raises(UserError, match="every image of .*train is in .*val too"):
        load_splits(str(root), SMALL)


def test_held_out_images_need_no_training_images(tmp_path):
    """As on a machine where a model is only verified."""
    root = tree(tmp_path / "d", train=())
    assert load_data(str(root), SMALL, "val", classes=NAMES).labels == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(UserError, match="no images found in .*train"):
        load_data(str(root), SMALL)


def test_what_is_no_image_is_counted(tmp_path):
    root = tree(tmp_path / "d")
    for i in range(3):
        (root / "train" / "cat" / f"{i}.heic").write_bytes(b"x")
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    (root / "val" / "cat" / "nowhere.png").symlink_to("gone")
    train, val = load_splits(str(root), SMALL)
    assert len(train) == 14 and any("3 .heic, 1 no file" in note for note in val.notes)
    assert sum(len(b.images) for b in batches(val, 4)) == 8 and "nowhere.png" in skipped_line(val.facts())


def test_layouts_are_explained(tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for source in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(UserError, match="train/CLASS/.*val/CLASS/"):
            load_data(str(source), SMALL)


@pytest.mark.parametrize("head", [None, 2, 3])
def test_two_spellings_of_one_name_are_one_class(tmp_path, head):
    for split, name in (("train", "caf\u00e9"), ("val", "cafe\u0301"), ("train", "tea"), ("val", "tea")):
        add(tmp_path / "d" / split / name, 2)
    train, val = load_splits(str(tmp_path / "d"), SMALL, head_classes=head)
    assert train.classes == val.classes == ("caf\u00e9", "tea") and val.labels == [0, 0, 1, 1] and not val.notes


# --- monstrous images ---


def test_whatever_a_decoder_raises_the_image_is_skipped(tmp_path, monkeypatch):
    add(tmp_path / "d" / "ant", 3)
    add(tmp_path / "d" / "bee", 3)

    def broken(*args, **kwargs):
        raise OverflowError("signed integer is greater than maximum")

    monkeypatch.setattr("moee.data.transform.converted", broken)
    train = load_data(str(tmp_path / "d"), SMALL)
    assert "signed integer" in train[0][1]


@pytest.mark.parametrize("size", [(200_000, 1), (1, 200_000)])
def test_an_image_that_would_fill_the_memory_is_skipped_by_name(tmp_path, caplog, size):
    root = tree(tmp_path / "d")
    Image.new("RGB", size).save(root / "train" / "cat" / "long.png")
    train = load_data(str(root), SMALL)
    for data in (train, widened(train, SMALL, 1, 1, 0)):
        read = sum(len(batch.images) for batch in batches(data, 8))
        assert len(data) - read == (1 if data is train else 2)
        assert all("long.png" in name for name in data.skipped.values())
    assert "pixels would be resized to" in caplog.text and "long.png" in skipped_line(train.facts())


def test_a_bomb_is_skipped_by_name(tmp_path):
    root = tree(tmp_path / "d")
    Image.fromarray(np.zeros((20_000, 10_000), dtype=np.uint8)).save(root / "train" / "cat" / "bomb.png")
    train = load_data(str(root), SMALL)
    assert sum(len(batch.images) for batch in batches(train, 8)) == len(train) - 1 and "bomb.png" in skipped_line(train.facts())


def test_panoramas_are_read(tmp_path):
    add(tmp_path / "d", 3)
    Image.new("RGB", (6000, 30), "red").save(tmp_path / "d" / "wide.png")
    assert sum(len(b.images) for split in load_splits(str(tmp_path / "d"), SMALL) for b in batches(split, 8)) == 4
    Transform((3, 4096, 4096), MEAN, STD, {}).refuse_oblong(4000, 400)
    Transform((3, 224, 224), MEAN, STD, {"crop_mode": "squash"}).refuse_oblong(200_000, 1)


def test_what_was_read_is_said(tmp_path, caplog):
    root = tree(tmp_path / "d", val=NAMES[:3])
    (root / "val" / "cat" / "0.png").write_bytes(b"no image")
    with caplog.at_level(logging.INFO, "moee"):
        train, val = load_splits(str(root), SMALL)
        say_read(train=train, val=val)
    assert "train: 14 images, 4 classes; val: 6 images, 3 classes (no 'dog')" in caplog.text
    assert torch.cat([b.labels for b in batches(val, 4)]).tolist() == [0, 0, 1, 1, 2]
    assert skipped_line(val.facts()) == f"skipped 1 unreadable image: {root / 'val' / 'cat' / '0.png'}"
    names = [str(root / "val" / "cat" / "0.png")]
    assert val.facts() == {"images": 6, "classes": 3, "unlabelled": 0, "skipped": 1, "first_skipped": names}


# --- splits by other names ---


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "valid"), ("Train", "Val"), ("training", "validation"), ("TRAIN", "dev"), ("train", "Test"),
        ("train2017", "val2017"), ("train_images", "test_images"), ("images/train", "images/val"),
        ("archive/data/Train", "archive/data/valid"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("head", [None, 4])
def test_splits_by_the_usual_names_are_held_apart(tmp_path, train, val, head):
    root = tmp_path / "d"
    for name in NAMES:
        add(root / train / name, 4)
        add(root / val / name, 2)
    (root / "labels" / "train").mkdir(parents=True)
    (root / "labels" / "train" / "0.txt").write_text("0 .5 .5 1 1")
    found = load_splits(str(root), SMALL, head_classes=head)
    assert [len(data) for data in found] == [16, 8] and all(data.classes == NAMES for data in found)
    assert all(os.path.relpath(path, root).startswith(val + os.sep) for path in found[1].paths)
    names = f"{os.path.basename(train)!r} is trained on and {os.path.basename(val)!r} is held out"
    assert (names in found[0].notes) == (os.path.basename(train) != "train" or os.path.basename(val) != "val")
    assert any("the splits lie in the folder" in note for note in found[0].notes) == ("/" in train)
    assert not any("a fifth" in note for note in found[0].notes)


def test_splits_without_classes(tmp_path):
    """As detection data sets have them: images/train/*.jpg."""
    add(tmp_path / "d" / "images" / "train", 5)
    add(tmp_path / "d" / "images" / "val", 3, 5)
    train, val = load_splits(str(tmp_path / "d"), SMALL, head_classes=2)
    assert (len(train), len(val)) == (5, 3) and not train.labelled and set(val.labels) == {-1}


def test_val_is_held_out_before_test_and_what_is_not_read_is_said(tmp_path):
    root = tree(tmp_path / "d")
    add(root / "test" / "ant", 2)
    add(root / "extra", 2)
    train, val = load_splits(str(root), SMALL)
    assert (len(train), len(val)) == (14, 8)
    assert "images beside 'train' and 'val' are not read ('extra', 'test')" in val.notes


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        (("val", "test"), "holds 'test', 'val' and no train"),
        (("images/val", "images/test"), "holds 'test', 'val' and no train"),
        (("train", "val", "valid"), "'val', 'valid', which may each be the same split"),
        (("train", "Train", "val"), "'Train', 'train', which may each be the same split"),
        (("train", "training"), "holds 'train', 'training' and no val"),
        (("Valid",), "holds 'Valid' and no train; give .*Valid itself to divide it"),
        (("x/test",), "x holds 'test' and no train"),
    ],
)
def test_splits_that_cannot_be_told_are_refused(tmp_path, splits, said):
    for split in splits:
        for name in NAMES[:2]:
            add(tmp_path / "d" / split / name, 2)
    with pytest.raises(UserError, match=f"{said}.*train/CLASS/.*val/CLASS/"):
        load_splits(str(tmp_path / "d"), SMALL)


@pytest.mark.parametrize("splits", [("val", "test"), ("valid",)])
def test_held_out_images_alone_are_read_where_nothing_is_trained(tmp_path, splits):
    for split in splits:
        for name in NAMES:
            add(tmp_path / "d" / split / name, 2)
    val = load_data(str(tmp_path / "d"), SMALL, "val", classes=NAMES)
    assert len(val) == 8 and val.classes == NAMES and f"{splits[0]!r} is held out, and there is no train" in val.notes


def test_a_class_with_splits_inside_is_refused(tmp_path):
    for name in NAMES:
        add(tmp_path / "d" / name / "train", 3)
        add(tmp_path / "d" / name / "val", 2)
    with pytest.raises(UserError, match="holds 'ant', which holds splits of its own.*train/CLASS/"):
        load_splits(str(tmp_path / "d"), SMALL)


def test_classes_beside_a_split_name_stay_classes(tmp_path):
    for name in ("bus", "dev", "test"):
        add(tmp_path / "d" / name, 4)
    assert load_data(str(tmp_path / "d"), SMALL).classes == ("bus", "dev", "test")


@pytest.mark.parametrize("head", [None, 4, 1000])
@pytest.mark.parametrize(
    ("train", "val", "wrapped"),
    [("images/", "", "train"), ("", "images/", "val"), ("train/", "val/", "train"), ("a/b/", "c/", "val")],
)
def test_a_folder_around_the_classes_of_one_split(tmp_path, train, val, wrapped, head):
    for name in NAMES:
        add(tmp_path / "d" / "train" / f"{train}{name}", 4)
        add(tmp_path / "d" / "val" / f"{val}{name}", 2)
    found = load_splits(str(tmp_path / "d"), SMALL, head_classes=head)
    assert [data.classes for data in found] == [NAMES, NAMES] and -1 not in found[0].labels + found[1].labels
    assert any(f"all images of {wrapped} lie in the folder" in note for note in found[0].notes)


def test_one_class_in_a_split_is_no_wrapper(tmp_path):
    for deep in ("train/cat/persian", "train/cat/siamese", "val/cat/persian", "val/dog/boxer"):
        add(tmp_path / "d" / deep, 2)
    train, _ = load_splits(str(tmp_path / "d"), SMALL, head_classes=2)
    assert train.classes == ("cat", "dog") and set(train.labels) == {0}
