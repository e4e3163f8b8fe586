"""A classifier that is right on every image by construction, the colour decides, is reported to be so in every layout of a
folder; and its class names reach everything that is made of it."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from exporter import cli
from moee.artifacts import checkpoint
from moee.artifacts.checkpoint import SCHEMA
from moee.data.sources import load_splits
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.models.model import load_model
from moee.stages.session import Session
from moee.store.artifact import write_manifest
from tests.conftest import TINY, tiny_spec

COLOURS = {"2 green": (20, 200, 30), "10 red": (220, 30, 20), "blue [x]": (20, 40, 230), "weiß": (240, 240, 240)}
NAMES = tuple(COLOURS)
FAST = ["--clusters", "2", "--cluster-tokens", "200", "--tokens", "600", "--keep", "0.999"]


def paint(folder, colour, count):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    for i in range(count):
        pixels = np.clip(np.array(colour) + rng.integers(-15, 16, (36, 40, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


def dataset(root, train=NAMES, val=NAMES):
    for split, names in (("train", train), ("val", val)):
        for name in names:
            paint(root / split / name, COLOURS[name], 7 if split == "train" else 6)
    return root


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The weights of a tiny ViT whose head reads the colour off its features."""
    folder = tmp_path_factory.mktemp("colours")
    torch.manual_seed(0)
    model = load_model(tiny_spec(num_classes=4))
    train, _ = load_splits(str(dataset(folder / "whole")), model_transform(model))
    images, labels = torch.stack([train.load(i) for i in range(len(train))]), torch.tensor(train.labels)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        centres = torch.stack([features[labels == c].mean(0) for c in range(4)])
        model.head.weight.copy_(20 * centres)
        model.head.bias.copy_(-10 * centres.square().sum(1))  # the nearest centre has the highest score
        assert (model(images).argmax(1) == labels).all()
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder


def spec(folder, **kwargs):
    weights = None if kwargs.get("num_classes") == 0 else str(folder / "weights.safetensors")
    if not weights:
        return tiny_spec(**kwargs)
    return tiny_spec(num_classes=4, **kwargs).model_copy(update={"weights": weights, "random_seed": None})


@pytest.fixture
def small_world(classifier, monkeypatch):
    monkeypatch.setattr("exporter.pretrained.resolve", lambda *args, **kwargs: spec(classifier))


@pytest.fixture(scope="module")
def extracted(classifier):
    """What `extract` makes of it on the folder that holds everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.pretrained.resolve", lambda *args, **kwargs: spec(classifier))
        assert cli.main(["extract", "tiny", "--data", str(classifier / "whole"), *FAST, "--out", str(classifier / "model")]) == 0
    return classifier / "model"


@pytest.fixture
def model(extracted, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(extracted, tmp_path / "model")


def rewrite(folder, **changes):
    """Another manifest around the same files; None removes a field."""
    body = {**json.loads((folder / "moee.json").read_text()), **changes}
    kept = {key: value for key, value in body.items() if value is not None and key not in ("schema", "files", "tools")}
    write_manifest(folder, "moee.json", SCHEMA, kept)


def layouts(root, name):
    """The folder of a layout whose classes a reader of single splits would number in another way."""
    if name == "flat":
        for colour in NAMES:
            paint(root / colour, COLOURS[colour], 20)
        return root
    split, _, which = name.partition(" lacks ")
    if which and not which.endswith("images"):
        fewer = [n for n in NAMES if n != NAMES[int(which)]]
        return dataset(root, **{split: fewer})
    dataset(root, **({split: NAMES[1:]} if which else {}))
    if which:
        (root / split / NAMES[0]).mkdir()
    if name == "stray":
        paint(root / "train", (1, 1, 1), 1)
        paint(root / "val", (1, 1, 1), 1)
    if name == "one more":
        paint(root / "val" / "zebra", (128, 128, 128), 3)
    if name == "hidden":
        paint(root / "val" / ".ipynb_checkpoints", (1, 1, 1), 2)
        paint(root / "train" / "__MACOSX", (1, 1, 1), 2)
    return root


LAYOUTS = [
    "whole", "flat", "val lacks 0", "val lacks 2", "train lacks 0", "train lacks 2", "val lacks images", "train lacks images",
    "stray", "one more", "hidden",
]  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_accuracy_is_whole_in_every_layout(classifier, tmp_path, name):
    session = Session(spec(classifier), str(layouts(tmp_path / "d", name)))
    kept = session.measure(copy.deepcopy(session.dense), None, "dense")["retention"]
    assert kept["dense_accuracy"] == kept["accuracy"] == 1.0
    assert session.classes(None) == NAMES


@pytest.mark.parametrize("name", ["val lacks 0", "stray"])
def test_names_go_with_the_model(classifier, small_world, tmp_path, capsys, name):
    """extract, export, verify and plan: right on every image, and the names in every manifest."""
    data = str(layouts(tmp_path / "d", name))
    run = lambda *argv: cli.main([str(a) for a in argv])  # noqa: E731
    assert run("extract", "tiny", "--data", data, *FAST, "--out", tmp_path / "model") == 0
    body = json.loads((tmp_path / "model" / "moee.json").read_text())
    assert body["classes"] == list(NAMES) and body["info"]["stages"]["extracted"]["retention"]["dense_accuracy"] == 1.0
    read = body["info"]["data_read"]
    assert read["train"]["images"] == (29 if name == "stray" else 28) and read["val"]["classes"] == (4 if name == "stray" else 3)
    assert run("export", tmp_path / "model", "--out", tmp_path / "export") == 0
    assert json.loads((tmp_path / "export" / "export.json").read_text())["classes"] == list(NAMES)
    assert run("verify", tmp_path / "export", "--out", tmp_path / "verify", "--max-drop", 50) == 0
    parity = json.loads((tmp_path / "verify" / "parity.json").read_text())
    assert parity["accuracy"]["dense_top1"]["value"] == 1.0 and parity["data_read"]["val"] == read["val"]
    plan = ["--max-drop", 50, "--methods", "static", "--targets", "0.9", "--cluster-tokens", 200, "--allocations", "share"]
    assert run("plan", "tiny", "--data", data, *plan, "--tokens", 600, "--out", tmp_path / "plan") == 0
    points = json.loads((tmp_path / "plan" / "plan.json").read_text())["points"]
    assert [p["accuracy"] for p in points if p["method"] == "dense"] == [1.0]


def test_an_artifact_numbers_foreign_folders_by_its_names(model, tmp_path):
    """A folder with fewer classes, and one of another name, under the artifact's mapping."""
    run = lambda *argv: cli.main([str(a) for a in argv])  # noqa: E731
    assert run("export", model, "--out", tmp_path / "export") == 0
    other = dataset(tmp_path / "other", NAMES[2:], NAMES[2:])
    paint(other / "val" / "aardvark", (1, 1, 1), 2)
    assert run("verify", tmp_path / "export", "--data", other, "--out", tmp_path / "verify") == 0
    parity = json.loads((tmp_path / "verify" / "parity.json").read_text())
    assert parity["accuracy"]["dense_top1"]["value"] == 1.0
    assert any("'aardvark' is none of the model's 4 classes" in note for note in parity["data_read"]["notes"])
    assert run("finetune", model, "--data", other, "--epochs", 1, "--lr", 1e-6, "--out", tmp_path / "tuned") == 0
    tuned = json.loads((tmp_path / "tuned" / "moee.json").read_text())
    assert tuned["classes"] == list(NAMES) and tuned["info"]["stages"]["tuned"]["retention"]["dense_accuracy"] == 1.0


def test_a_probe_has_the_names_of_its_rows(classifier, tmp_path):
    """A backbone without a head: the classes of train, in val too, where one of them lacks."""
    session = Session(spec(classifier, num_classes=0), str(layouts(tmp_path / "d", "val lacks 1")))
    probe = session.probe()
    assert session.classes(probe) == NAMES and len(probe.bias) == 4
    assert session.measure(copy.deepcopy(session.dense), probe, "dense")["retention"]["dense_accuracy"] == 1.0


def test_classes_that_do_not_fit_the_head_are_not_recorded(tmp_path):
    session = Session(tiny_spec(), str(dataset(tmp_path / "d")))
    assert TINY["num_classes"] == 10 and session.train.num_classes == 4 and session.classes(None) == ()


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["a", "b", "c"], "names 3 classes, the model tells 4 apart"),
        (["a", "b", "c", "c"], "names that differ"),
        (["a", "b", "c", "d\n"], "without control characters"),
        (["a", "b", "c", ""], "at least 1 item"),
        (["a", "b", "c", "d" * 2000], "at most 1000 characters"),
        (["a", "b", "c", 4], "valid string"),
        ([str(i) for i in range(40_000)], "at most 32768 items"),
    ],
)
def test_names_from_a_manifest_are_checked(model, classes, said):
    rewrite(model, classes=classes)
    with pytest.raises(UserError, match=said):
        checkpoint.load(model)


def test_older_artifacts_have_no_names(model, tmp_path):
    rewrite(model, classes=None)
    moee = checkpoint.load(model)
    assert moee.classes == ()
    session = Session(moee.spec, str(layouts(tmp_path / "d", "val lacks 0")), classes=moee.classes)
    assert session.measure(moee.model, None, "old")["retention"]["dense_accuracy"] == 1.0


@pytest.mark.parametrize("name", ["stray", "one more", "train lacks 2", "val lacks 0"])
def test_images_without_a_label_leave_a_probe_alone(classifier, tmp_path, name):
    session = Session(spec(classifier, num_classes=0), str(layouts(tmp_path / "d", name)))
    probe = session.probe()
    assert session.measure(copy.deepcopy(session.dense), probe, "dense")["retention"]["dense_accuracy"] == 1.0
    assert session.classes(probe) == (NAMES if name != "train lacks 2" else NAMES[:2] + NAMES[3:])
