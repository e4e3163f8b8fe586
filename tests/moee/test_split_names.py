"""Names of splits in a folder: held-out images are never trained on as one more class, and classes are never taken for splits."""

import os

import pytest

from moee.data.sources import load_data, load_splits
from moee.data.split_names import Names, read_name, words_of
from moee.errors import UserError
from tests.moee.test_folders import NAMES, SMALL, add

CLASSES = NAMES[:2]


def lay_out(root, folders, classes=CLASSES, count=3):
    for position, folder in enumerate(folders):
        for name in classes:
            add(root / folder / name, count, 20 * position)
    return str(root)


def top_folders(data, root):
    return {os.path.relpath(path, root).split(os.sep)[0] for path in data.paths}


@pytest.mark.parametrize(
    ("name", "kind", "rest"),
    [
        ("seg_train", "train", ("seg",)), ("Trainingsdaten", "train", ()), ("trainA", "train", ("a",)),
        ("XTrain", "train", ("x",)), ("80_train", "train", ()), ("TRAIN2017", "train", ()), ("trainval", "trainval", ()),
        ("train_val", "trainval", ()), ("trn", "train", ()), ("ValidierungsBilder", "val", ()),
        ("validierungsdaten", "val", ()), ("validación", "val", ()), ("vld", "val", ()), ("dev-set", "val", ()),
        ("hold-out", "eval", ()), ("held_out_images", "eval", ()), ("evaluation", "eval", ()), ("Testdaten", "test", ()),
        ("test_tube", "test", ("tube",)), ("tst", "test", ()), ("seg_pred", "pred", ("seg",)), ("train_test", "several", ()),
        ("训练集", "train", ()), ("flowers-val-000", "val", ("flowers",)), ("trainers", None, ("trainers",)),
        ("validator", None, ("validator",)), ("contest", None, ("contest",)), ("invalid", None, ("invalid",)),
        ("rain", None, ("rain",)), ("evaluator", None, ("evaluator",)), ("te", None, ("te",)),
    ],
)  # fmt: skip
def test_names_are_read_by_their_words(name, kind, rest):
    assert (read_name(name).kind, read_name(name).rest) == (kind, rest)


def test_words_lie_between_digits_signs_and_camel_case():
    assert words_of("myData-2017.TrainSet_ABCd") == ["my", "data", "train", "set", "ab", "cd"]


def test_two_letters_are_a_split_only_beside_splits():
    assert Names(["tr", "te"]).pair() == ("tr", "te") and Names(["tr", "val"]).pair() == ("tr", "val")
    assert Names(["tr", "te", "en", "de"]).named == []


@pytest.mark.parametrize(
    ("train", "held_out", "beside"),
    [
        ("seg_train", "seg_test", ("seg_pred",)), ("train", "eval", ()), ("train", "holdout", ()), ("trn", "vld", ()),
        ("Trainingsdaten", "Testdaten", ()), ("train_A", "test_A", ()), ("flowers_train", "flowers_val", ("flowers_test",)),
        ("80_train", "20_val", ()), ("a/b/c/d/e/train", "a/b/c/d/e/val", ()), ("trainX", "testX", ()),
        ("train", "eval", ("other",)), ("bounding_box_train", "bounding_box_test", ("query",)),
        ("train", "test_photos_2020", ("images_pred",)), ("tr", "te", ()),
        ("train", "valid", ("train_augmented", "train_val")), ("train/train", "train/val", ()), ("trainval", "test", ()),
    ],
)  # fmt: skip
def test_splits_are_found_by_words_of_their_names(tmp_path, train, held_out, beside):
    source = lay_out(tmp_path / "d", (train, held_out, *beside))
    found = load_splits(source, SMALL, head_classes=2)
    for data, folder in zip(found, (train, held_out), strict=True):
        assert len(data) == 6 and data.classes == CLASSES
        assert all(os.path.relpath(path, source).startswith(folder + os.sep) for path in data.paths)
    if (train, held_out) != ("train", "val") and "/" not in train:
        assert f"{train!r} is trained on and {held_out!r} is held out" in found[0].notes
    assert any("are not read" in note for note in found[0].notes) == bool(beside)
    assert load_data(source, SMALL, "val").paths == found[1].paths


def test_splits_with_a_folder_of_their_own_name_inside(tmp_path):
    """As Kaggle's archives of seg_train, seg_test and seg_pred have it."""
    source = lay_out(tmp_path / "d", ("seg_train/seg_train", "seg_test/seg_test"), NAMES)
    add(tmp_path / "d" / "seg_pred" / "seg_pred", 3)
    found = load_splits(source, SMALL, head_classes=4)
    assert [len(data) for data in found] == [12, 12] and all(data.classes == NAMES for data in found)
    assert [top_folders(data, source) for data in found] == [{"seg_train"}, {"seg_test"}]


@pytest.mark.parametrize(
    "folders",
    [
        ("train_A", "train_B", "test_A", "test_B"), ("train_x", "test_y"), ("train", "other"),
        ("train", "gallery", "query", "more"), ("training", "unlabeled"), ("train", "train_augmented", "test_A"),
        ("flowers_val", "flowers_test"), ("val", "test", "extra"), ("train_test", "other_test"),
        ("cat/train", "cat/val", "dog/train", "dog/val"), ("seg_val", "pred"), ("trainval", "val"),
        ("cat/cat_train", "cat/cat_test", "dog/dog_train", "dog/dog_test"), ("x/cat/train", "x/cat/val", "x/dog"),
        ("a/images/train", "a/images/test", "b/images"), ("train/cat/train", "train/cat/val", "train/dog"),
    ],
)  # fmt: skip
def test_names_that_may_be_splits_are_refused_in_a_sentence_that_says_the_layout(tmp_path, folders):
    with pytest.raises(UserError, match=r"data .* holds '.*; an image folder holds train/CLASS/"):
        load_splits(lay_out(tmp_path / "d", folders), SMALL)


def test_two_flat_folders_of_which_one_is_called_train_are_refused(tmp_path):
    """With so few beside it, it may be a split as well as a vehicle."""
    add(tmp_path / "d" / "train")
    add(tmp_path / "d" / "bus")
    with pytest.raises(UserError, match="holds 'train', 'bus' and no val.*put classes into one folder called train"):
        load_splits(str(tmp_path / "d"), SMALL)
    os.renames(tmp_path / "d" / "train", tmp_path / "e" / "train" / "train")
    os.renames(tmp_path / "d" / "bus", tmp_path / "e" / "train" / "bus")
    assert load_splits(str(tmp_path / "e"), SMALL)[0].classes == ("bus", "train")


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("bus", "car", "plane", "train"), "'train' is taken for a class, as 'bus', 'car', 'plane' beside"),
        (("beaker", "flask", "test_tube"), None), (("breadboard", "dev_board"), None),
        (("invalid", "valid"), "'valid' is taken"),
        (("boot", "sandal", "training_shoe"), "'training_shoe' is taken for a class"), (("contest", "validator"), None),
        (("de", "en", "te", "tr"), None), (("bus", "car", "plane", "test_tube", "train"), "'train' is taken"),
        (("labeled", "unlabeled"), "'unlabeled' is taken"), (("beaker", "flask", "test_paper", "test_tube", "vial"), None),
    ],
)  # fmt: skip
def test_classes_with_such_words_in_their_names_stay_classes(tmp_path, classes, said):
    for name in classes:
        add(tmp_path / "d" / name, 4)
    train, val = load_splits(str(tmp_path / "d"), SMALL)
    assert train.classes == val.classes == classes and len(train) + len(val) == 4 * len(classes)
    assert [note for note in train.notes if "taken for" in note and (said is None or said not in note)] == []
    assert any("taken for" in note for note in train.notes) == (said is not None)


def test_a_link_that_leads_back_up_ends_the_search_for_splits(tmp_path):
    (tmp_path / "d" / "inner").mkdir(parents=True)
    (tmp_path / "d" / "inner" / "again").symlink_to(tmp_path / "d")
    with pytest.raises(UserError, match="no images found"):
        load_splits(str(tmp_path / "d"), SMALL)
