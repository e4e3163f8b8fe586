"""Class names that a folder of timm's layout brings are the head's order: `label_names` of its config.json."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from moee.data import sources
from moee.data.transform import model_transform
from moee.models.model import build_model
from moee.models.source import ModelOptions, named_model
from moee.weights.hub import find_folder

NAMES = ["d", "c", "b", "a"]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    timm.models.save_for_hf(model, tmp_path / "hub", model_args={"img_size": 32})
    return tmp_path / "hub"


@pytest.fixture
def images(tmp_path):
    def made(*names):
        for split in ("train", "val"):
            for name in names:
                place = tmp_path / "data" / split / name
                place.mkdir(parents=True)
                for number in range(2):
                    Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(place / f"{number}.png")
        return str(tmp_path / "data")

    return made


def configured(folder, top=None, inner=None):
    path = folder / "config.json"
    body = json.loads(path.read_text())
    body.update(top or {})
    body["pretrained_cfg"].update(inner or {})
    path.write_text(json.dumps(body))
    said = []
    return named_model(f"local-dir:{folder}", ModelOptions(), said.append), said


def splits(source, spec, classes=None):
    transform = model_transform(build_model(spec))
    return sources.load_splits(source, transform, 0, classes, 4, labels=spec.labels)[0]


NUMBERED = {str(i): name for i, name in reversed(list(enumerate(NAMES)))}
DESCRIBED = {name: name.upper() for name in NAMES}


@pytest.mark.parametrize(
    ("top", "inner"),
    [
        ({"label_names": NAMES}, {}), ({}, {"label_names": NAMES}), ({"label_names": NUMBERED}, {}), ({}, {"labels": NAMES}),
        ({"label_names": NAMES, "label_descriptions": {}}, {}), ({"label_descriptions": DESCRIBED}, {}),
        ({}, {"label_descriptions": DESCRIBED}),
    ],
)  # fmt: skip
def test_the_names_of_a_folder_number_the_classes_wherever_they_stand(folder, images, top, inner):
    spec, _ = configured(folder, top, inner)
    assert spec.labels == tuple(NAMES)
    train = splits(images("a", "b", "c", "d"), spec)
    assert train.classes == tuple(NAMES) and train.labels == [3, 3, 2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize("names", [NAMES, NAMES[:3]])
def test_names_stay_where_only_the_head_says_how_many_classes_there_are(folder, images, names):
    """As folders of earlier timm, whose model_args lack num_classes."""
    path = folder / "config.json"
    body = json.loads(path.read_text())
    body["model_args"] = {"img_size": 32}
    path.write_text(json.dumps(body))
    spec, said = configured(folder, {"label_names": names})
    assert any("4 classes, as the classifier of" in note for note in said)
    train = splits(images("a", "b", "c", "d"), spec)
    if names == NAMES:
        assert train.classes == tuple(NAMES) and train.labels == [3, 3, 2, 2, 1, 1, 0, 0]
    else:
        assert any("the model names 3 classes and tells 4 apart: its class numbers are guessed" in note for note in train.notes)


def test_a_class_map_wins(folder, images):
    spec, _ = configured(folder, {"label_names": NAMES})
    assert splits(images("a", "b", "c", "d"), spec, ("b", "a", "d", "c")).classes == ("b", "a", "d", "c")


def test_a_folder_of_another_name_has_no_label(folder, images):
    spec, _ = configured(folder, {"label_names": NAMES})
    train = splits(images("a", "b", "c", "other"), spec)
    assert train.classes == tuple(NAMES) and train.labels == [3, 3, 2, 2, 1, 1, -1, -1]
    assert any("'other' is none of the model's 4 classes: 2 images of train have no label" in note for note in train.notes)


def test_where_no_name_is_known_accuracy_cannot_be_compared(folder, images):
    spec, _ = configured(folder, {"label_names": NAMES})
    train = splits(images("p", "q", "r", "s"), spec)
    assert set(train.labels) == {-1}
    assert any("none of 'p', 'q', 'r' and 1 more is a class name of the model" in note for note in train.notes)


def test_numbers_and_another_count_of_names_are_said_and_guessed(folder, images):
    spec, _ = configured(folder, {"label_names": NAMES[:3]})
    train = splits(images("a", "b", "c", "d"), spec)
    assert train.classes == ("a", "b", "c", "d")
    assert any("the model names 3 classes and tells 4 apart: its class numbers are guessed" in note for note in train.notes)


def test_folders_called_by_numbers_stand_for_themselves(folder, images):
    spec, _ = configured(folder, {"label_names": NAMES})
    assert splits(images("0", "1", "2", "3"), spec).labels == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "a", "b", "c"], "names 'a' twice"), ([1, 2, 3, 4], "holds what is no class name"), ("abcd", "is no list of names"),
        ({"0": "a", "2": "b"}, "is no list of names"), (["a\n", "b", "c", "d"], "holds what is no class name"),
        (["a", "b", "", "d"], "holds what is no class name"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_used_are_said(folder, names, said):
    spec, notes = configured(folder, {"label_names": names})
    assert spec.labels == () and any(said in note and "--class-map" in note for note in notes)


def test_a_folder_without_names_has_none(folder):
    assert find_folder("local-dir", str(folder)).labels() == ((), "")
