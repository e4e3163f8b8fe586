"""What a command read is recorded by its absolute path: later ones find it from any folder, and take no other of its name."""

import shutil

import pytest
import torch

from exporter.report.commands import _extract
from exporter.terminal.ui import title_of
from moee.artifacts import checkpoint
from moee.artifacts.card import _source
from moee.artifacts.model import recorded_data
from moee.data.sources import load_data, located, same_data
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.models.model import load_model
from moee.places.inputs import source_paths
from moee.schema import data_title
from moee.stages.session import Session
from moee.store.artifact import read_json, write_json
from tests.conftest import tiny_spec
from tests.exporter.command import run
from tests.moee.test_folders import tree

FEW = ["--clusters", "2", "--cluster-tokens", "60", "--tokens", "120", "--components", "4", "--keep", "0.9"]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with pictures and weights, in which commands run; another one beside it with other pictures of that name."""
    for place in ("here", "there"):
        tree(tmp_path / place / "pictures", ("a", "b"), ("a", "b") if place == "here" else ("b",))
    model = load_model(tiny_spec(num_classes=2))
    torch.save(model.state_dict(), tmp_path / "here" / "w.pth")
    monkeypatch.setenv("MOEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_later_commands_from_another_folder_read_what_the_first_one_read(workplace, monkeypatch, capsys):
    here, spec = workplace / "here", tiny_spec(num_classes=2)
    sizes = [word for name, value in spec.kwargs.items() if name != "num_classes" for word in (f"{name}={value}",)]
    model = [spec.timm_name, "--checkpoint", "w.pth", "--model-kwargs", *sizes]
    assert run("extract", *model, "--data", "pictures", *FEW, "--out", "extracted") == 0
    body = read_json("extracted/moee.json")
    assert body["data"] == body["info"]["stages"]["extracted"]["data"] == str(here / "pictures")
    assert body["model"]["weights"] == str(here / "w.pth")
    words = _extract(body)[-1]
    assert f"--checkpoint {here / 'w.pth'}" in words and f"--data {here / 'pictures'}" in words
    assert "on pictures" in capsys.readouterr().out

    monkeypatch.chdir(workplace / "there")
    assert run("finetune", "../here/extracted", "--epochs", 1, "--lr", 1e-6, "--out", "tuned") == 0
    tuned = checkpoint.load("tuned")
    assert tuned.data == str(here / "pictures") and len(tuned.record.images("val")) == 4
    assert "on pictures" in capsys.readouterr().out


def test_names_of_built_in_data_stay_and_folders_become_absolute(workplace):
    (workplace / "here" / "digits").mkdir()
    root = str(workplace / "here")
    assert [located(name) for name in ("digits", "photos:8", "torch/cifar10", "nowhere")] == [
        "digits", "photos:8", f"torch/cifar10@{root}", "nowhere",
    ]  # fmt: skip
    assert located("./digits/") == f"{root}/digits" and located("wds/pictures") == f"wds/{root}/pictures"
    assert same_data("wds/pictures", f"wds/{root}/pictures") and not same_data("wds/pictures", "digits")
    assert Session(tiny_spec(), "pictures").source == f"{root}/pictures"
    assert data_title(f"{root}/pictures") == "pictures" and data_title("photos:8") == "photos:8"
    assert title_of({"stages": {}}, "tiny", f"{root}/pictures") == "tiny on pictures"


def test_sets_of_torchvision_are_recorded_with_their_folder(workplace, monkeypatch):
    """By name alone, a command in another folder read the set of that name there."""
    here, there = workplace / "here" / "pictures", workplace / "there" / "pictures"
    monkeypatch.chdir(here)
    named = located("torch/image_folder")
    assert named == f"torch/image_folder@{here}" == located(named) == located("torch/image_folder@../pictures")
    assert data_title(named) == "torch/image_folder" and data_title(f"wds/{here}") == "wds/pictures"
    assert _source(named) == "`torch/image_folder`" and _source(f"wds/{here}") == "`wds/pictures`"
    monkeypatch.chdir(there)
    transform = model_transform(load_model(tiny_spec(num_classes=2)))
    assert load_data(named, transform, "val").counts() == {"a": 2, "b": 2}
    assert load_data(f"torch/image_folder@{here}", transform, "val").counts() == {"a": 2, "b": 2}
    assert not same_data(named, "torch/image_folder") and not same_data(named, f"torch/cifar10@{here}")
    assert same_data(named, "torch/image_folder@../../here/pictures") and source_paths(named) == (here,)
    with pytest.raises(UserError, match="nowhere is no folder; give the one that the set lies in"):
        load_data("torch/image_folder@nowhere", transform)


def test_recorded_images_that_are_gone_are_asked_for(workplace):
    place = workplace / "here" / "pictures"
    for source in (str(place), f"torch/image_folder@{place}", "pictures"):
        assert recorded_data(source) == source
    with pytest.raises(UserError, match="torch/cifar10@.* as its data, which may be fetched"):
        recorded_data(f"torch/cifar10@{place}")
    shutil.rmtree(place)
    for source in (str(place), f"wds/{place}", f"torch/image_folder@{place}"):
        with pytest.raises(UserError, match="was made on '?.*pictures'?, where no folder is now; say where it lies with --data"):
            recorded_data(source)


def test_an_artifact_of_before_names_its_images_as_they_were_typed(workplace, tiny_export):
    shutil.copytree(tiny_export.root / "model", workplace / "here" / "model")
    body = read_json("model/moee.json")
    write_json("model/moee.json", {**body, "data": "pictures"})
    moee = checkpoint.load("model")
    assert moee.data == "pictures" and len(moee.record.images("val")) == 4
    assert model_transform(moee.model) == moee.record.transform


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("local-dir:m", "/x/m/model.safetensors", "local-dir:/x/m "),
        ("local-dir:/x/m", "/x/m/model.safetensors", "local-dir:/x/m "), ("hf:./m/", "/x/m/model.safetensors", "hf:/x/m "),
        ("local-dir:m", "m/model.safetensors", "local-dir:m "),
        ("hf:m", "/y/other.pth", "hf:m --data digits --checkpoint /y/other.pth"),
    ],
)  # fmt: skip
def test_commands_of_a_report_name_local_models_by_where_they_lay(name, weights, said):
    line = _extract({"model": {"name": name, "weights": weights}, "data": "digits", "recipe": None})[-1]
    assert line.startswith(f"moee extract {said}") and ("--checkpoint" in line) == ("--checkpoint" in said)
