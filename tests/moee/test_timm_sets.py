"""Sets that timm.data opens by name: their labels and names of classes are used."""

import io
from types import SimpleNamespace

import pytest
from PIL import Image

from moee.data.image_set import batches
from moee.data.sources import load_data, load_splits, located
from moee.data.transform import Transform
from moee.errors import MissingDependency, UserError

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SMALL = Transform((3, 32, 32), MEAN, STD, {"mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.9})


class Pictures:
    """A torchvision set: grey pictures, an attribute `targets`, and `classes` if it has names."""

    def __init__(self, targets, classes=None, size=(40, 40)):
        self.targets, self.size = targets, size
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Image.new("L", self.size, 40 * index % 256), self.targets[index]


class Rows(Pictures):
    """A set of timm's reader of Hugging Face data sets."""

    def __init__(self, targets, class_to_idx):
        super().__init__(targets)
        buffer = io.BytesIO()
        Image.new("RGB", (40, 40)).save(buffer, "PNG")
        self.reader = type("Reader", (), {
            "__getitem__": lambda reader, index: (io.BytesIO(buffer.getvalue()), targets[index]),
            "iter_targets": lambda reader: iter(targets), "class_to_idx": class_to_idx,
        })()  # fmt: skip


def serve(monkeypatch, train, val):
    monkeypatch.setattr("timm.data.create_dataset", lambda name, root, split: train if split == "train" else val)


def test_the_sets_own_order_of_names(monkeypatch):
    names = ["trouser", "bag", "ankle boot"]
    serve(monkeypatch, Pictures([0, 1, 2, 2], names), Pictures([2, 0], names))
    train, val = load_splits("torch/fashion", SMALL, head_classes=3)
    assert train.classes == val.classes == tuple(names) and train.labels == [0, 1, 2, 2] and val.labels == [2, 0]
    assert next(batches(val, 2)).images.shape == (2, 3, 32, 32), "grey pictures too"
    assert load_data("torch/fashion", SMALL, "val", classes=("bag", "ankle boot")).labels == [1, -1]


def test_numbers_where_there_are_no_names(monkeypatch):
    serve(monkeypatch, Pictures([3, 5, 5]), Pictures([5]))
    train, val = load_splits("torch/some", SMALL)
    assert train.classes == ("3", "5") and train.labels == [0, 1, 1] and val.labels == [1]


@pytest.mark.parametrize("names", [["a", "a"], ["a", ""], [("crane", "bird"), ("crane", "bird")]])
def test_names_that_do_not_tell_classes_apart(monkeypatch, names):
    serve(monkeypatch, Pictures([0, 1], names), Pictures([1], names))
    assert load_data("torch/some", SMALL).classes == ("0", "1")


def test_hugging_face(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    names = {"Zebra": 0, "ant": 1, "bee": 2}
    serve(monkeypatch, Rows([0, 1, None], names), Rows([2, 1], names))
    train, val = load_splits("hfds/some/set", SMALL, head_classes=3)
    assert train.classes == ("Zebra", "ant", "bee") and train.labels == [0, 1, -1] and val.labels == [2, 1]
    assert next(batches(val, 2)).images.shape == (2, 3, 32, 32)
    serve(monkeypatch, Rows([[0, 1], [2]], names), Rows([2], names))  # several labels an image
    assert not load_data("hfds/some/set", SMALL).labelled


def test_torchvisions_reader_of_folders(tmp_path, monkeypatch):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 36)).save(tmp_path / split / name / "0.png")
    monkeypatch.chdir(tmp_path)
    train, val = load_splits("torch/image_folder", SMALL, head_classes=2)
    assert train.classes == ("cat", "dog") and val.labels == [0, 1] and next(batches(val, 2)).images.shape[0] == 2


def pictures(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (40, 36), 60).save(root / name / "0.png")


def test_a_split_that_numbers_its_own_folders(tmp_path, monkeypatch):
    """torchvision's ImageFolder numbers the folders of each split from 0: val lacks 'bee', and has 'wasp' alone."""
    pictures(tmp_path / "train", "ant", "bee", "cat")
    pictures(tmp_path / "val", "ant", "cat", "wasp")
    monkeypatch.chdir(tmp_path)
    train, val = load_splits("torch/image_folder", SMALL, head_classes=3)
    assert train.classes == val.classes == ("ant", "bee", "cat") and train.labels == [0, 1, 2] and val.labels == [0, 2, -1]
    assert any("'wasp' is in val alone" in note for note in val.notes)


@pytest.mark.parametrize("splits", [["train/a", "train/b", "test/a", "test/b"], ["a", "b"], ["train/a", "train/b"]])
def test_folders_without_a_split_of_their_own_are_refused(splits, tmp_path, monkeypatch):
    """timm takes the folder above for a split that it does not find: "train" would be a class."""
    pictures(tmp_path, *splits)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="lacks one of them, so images would be both trained on and held out"):
        load_splits("torch/image_folder", SMALL, head_classes=2)


def test_a_long_picture_is_skipped(monkeypatch):
    serve(monkeypatch, Pictures([0, 1], size=(200_000, 1)), Pictures([0, 1]))
    data = load_data("torch/some", SMALL)
    with pytest.raises(UserError, match="none of the 2 images"):
        list(batches(data, 2))


def test_what_cannot_be_read_is_said(monkeypatch):
    with pytest.raises(UserError, match="is a stream, and images are read by position; write them into a folder"):
        load_data("tfds/cifar10", SMALL)
    assert located("tfds/cifar10") == "tfds/cifar10" and located("hfids/set") == "hfids/set", "no folder of this machine"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="needs the package datasets"):
        load_data("hfds/cifar10", SMALL)
    monkeypatch.undo()
    with pytest.raises(UserError, match="torch/nothing.*no images found"):
        load_data("torch/nothing", SMALL)


def test_numbers_without_names_are_said_to_be_numbers(monkeypatch):
    serve(monkeypatch, Pictures([1, 2, 5, 5]), Pictures([5, 1]))
    train, val = load_splits("torch/made_up", SMALL, head_classes=3)
    assert (train.labels, val.labels) == ([0, 1, 2, 2], [2, 0])
    assert any("are not 0 to 2" in note for note in train.notes)
    train, val = load_splits("torch/made_up", SMALL, classes=[f"class {i}" for i in range(6)])
    assert (train.labels, val.labels) == ([1, 2, 5, 5], [5, 1]) and any("taken as positions" in note for note in val.notes)
