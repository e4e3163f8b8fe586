"""Every command reads the images of an artifact as it was made from them: the same division, the same classes."""

import shutil
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from exporter import cli
from exporter.graph.export import export
from moee.artifacts import checkpoint, trained_on
from moee.artifacts.model import MoeeModel
from moee.data.sources import load_data, load_splits
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.methods.recipe import Recipe, method_options
from moee.models.model import load_model
from moee.stages.session import Session
from moee.store.artifact import read_json, write_json
from tests.conftest import extract, tiny_images, tiny_spec

SEED, CLASSES = 3, tuple("abcdefghij")
TRANSFORM = model_transform(load_model(tiny_spec()))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An artifact of a folder without splits, of which the seed decides what is held out; and its export."""
    root = tmp_path_factory.mktemp("record")
    random = np.random.default_rng(0)
    for number in range(40):
        place = root / "pictures" / CLASSES[number % 10]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEE_CACHE", str(root / "cache"))
        model = load_model(tiny_spec())
        config = method_options(clustering="kmeans", clusters=2, cluster_tokens=300, seed=SEED)
        extract(model, tiny_images(), config)
    moee = MoeeModel(model.eval(), tiny_spec(), Recipe.of(config), str(root / "pictures"), classes=CLASSES)
    checkpoint.save(moee, root / "model")
    export(moee, root / "export", source=root / "model")
    return root


class Stop(Exception):
    pass


COMMANDS = {
    "verify": ("verify", "EXPORT"),
    "verify --data": ("verify", "EXPORT", "--data", "DATA"),
    "plots": ("plots", "MODEL", "--out", "OUT"),
    "bench": ("bench", "EXPORT"),
    "bench --data": ("bench", "EXPORT", "--data", "DATA"),
    "export": ("export", "MODEL", "--precision", "int8", "--out", "OUT"),
    "export --data": ("export", "MODEL", "--precision", "int8", "--data", "DATA", "--out", "OUT"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_divides_and_numbers_the_images_alike(made, tmp_path, monkeypatch, name):
    seen = []

    def opened(source, transform, *rest, **named):
        split, *read = rest if isinstance(rest[0], str) else ("both", *rest)
        read += [named["head_classes"]] if "head_classes" in named else []
        seen.append((source, transform.shape, split, *read[:3]))
        raise Stop

    for function in ("load_data", "load_splits"):
        monkeypatch.setattr(f"moee.data.sources.{function}", opened)
    places = {"EXPORT": made / "export", "MODEL": made / "model", "DATA": made / "pictures", "OUT": tmp_path / "out"}
    assert cli.main([str(places.get(word, word)) for word in COMMANDS[name]]) == 1
    split = {"plots": "both", "export": "train"}.get(name.split()[0], "val")
    assert seen == [(str(made / "pictures"), (3, 32, 32), split, SEED, CLASSES, 10)]


def test_int8_calibrates_on_no_held_out_image(made, tmp_path, monkeypatch):
    used = []

    def calibrate(model, data, *rest):
        used.append({data.describe(i) for i in range(len(data))})
        raise Stop

    monkeypatch.setattr("exporter.graph.export.calibrate", calibrate)
    moee = checkpoint.load(made / "model")
    held_out = moee.record.images("val")
    for data in ((), ("--data", str(made / "pictures"))):
        assert cli.main(["export", str(made / "model"), "--precision", "int8", "--out", str(tmp_path / "out"), *data]) == 1
    assert len(used) == 2 and all(used) and not used[0] & {held_out.describe(i) for i in range(len(held_out))}
    assert used[0] == used[1]


def changed(root, how):
    """The folder of pictures as it is later."""
    first = root / "pictures" / "a" / "0.png"
    if how == "grown":
        shutil.copy(first, root / "pictures" / "b" / "new.png")
    elif how == "renamed":
        first.rename(first.with_name("00.png"))
    elif how == "split":
        (root / "pictures").rename(root / "train")
        (root / "pictures" / "val" / "a").mkdir(parents=True)
        (root / "train").rename(root / "pictures" / "train")
        shutil.copy(root / "pictures" / "train" / "a" / "0.png", root / "pictures" / "val" / "a")


def recorded(made, root, facts):
    """The artifact and its export in `root`, with a copy of the pictures and these facts about them."""
    shutil.copytree(made, root, dirs_exist_ok=True)
    body = read_json(root / "model" / "moee.json")
    body["data"], body["info"]["data_read"] = str(root / "pictures"), facts
    write_json(root / "model" / "moee.json", body)
    export_body = read_json(root / "export" / "export.json")
    export_body["data"] = str(root / "pictures")
    write_json(root / "export" / "export.json", export_body)
    return root


COUNTS = {"train": {"images": 32}, "val": {"images": 8}}
LATER = {
    "verify": ("verify", "EXPORT"),
    "verify --data": ("verify", "EXPORT", "--data", "DATA"),
    "plots": ("plots", "MODEL", "--out", "OUT"),
    "export": ("export", "MODEL", "--precision", "int8", "--out", "OUT"),
    "finetune": ("finetune", "MODEL", "--epochs", "1", "--out", "OUT"),
    "finetune --data": ("finetune", "MODEL", "--data", "DATA", "--epochs", "1", "--out", "OUT"),
}


@pytest.mark.parametrize("name", LATER)
def test_a_folder_that_grew_is_not_divided_anew(made, tmp_path, capsys, name):
    """Its division would hold out what was trained on."""
    root = recorded(made, tmp_path / "r", COUNTS)
    changed(root, "grown")
    places = {"EXPORT": root / "export", "MODEL": root / "model", "DATA": f"{root}/./pictures", "OUT": root / "out"}
    assert cli.main([str(places.get(word, word)) for word in LATER[name]]) == 2
    said = capsys.readouterr().err
    assert "has no splits: the artifact was made on 40 images of it, there are 41 now" in said and "extract again" in said
    assert not (root / "out").exists()


@pytest.mark.parametrize("facts", ["before", "recorded"])
@pytest.mark.parametrize("how", ["same", "grown", "renamed", "split"])
def test_what_was_recorded_of_a_division_is_compared(made, tmp_path, facts, how):
    """Artifacts of before recorded counts alone; a folder with splits of its own needs no division."""
    whole = load_data(str(made / "pictures"), TRANSFORM).division
    assert whole.images == 40
    root = recorded(made, tmp_path / "r", COUNTS if facts == "before" else {**COUNTS, "division": asdict(whole)})
    changed(root, how)
    record = checkpoint.load(root / "model").record
    if how == "grown" or (how, facts) == ("renamed", "recorded"):
        with pytest.raises(UserError, match="41 now" if how == "grown" else "as many others now"):
            record.images("val")
        with pytest.raises(UserError, match="would be held out"):
            record.splits()
    else:
        assert len(record.images("val")) == (1 if how == "split" else 8)
    shutil.copytree(made / "pictures", tmp_path / "others")
    assert len(record.images("val", str(tmp_path / "others"))) == 8, "of other data nothing is known"


@pytest.mark.parametrize("stages", [
    {"extracted": "now"}, {"extracted": "before"}, {"tuned": "now"}, {"shrunk": "now"}, {"tuned": "earlier"},
    {"shrunk": "earlier"},
])  # fmt: skip
def test_what_an_earlier_stage_divided_is_not_divided_anew(made, tmp_path, stages):
    """The artifact's data are others by now; its model has seen images of these all the same."""
    whole = asdict(load_data(str(made / "pictures"), TRANSFORM).division)
    root = recorded(made, tmp_path / "r", {**COUNTS, "division": None})
    body = read_json(root / "model" / "moee.json")
    body["data"] = "photos"
    for name, how in stages.items():
        told = {"data": str(root / "pictures"), "division": whole}
        if how == "before":  # as artifacts of before that were tuned on other data
            told = {"data": told["data"], "data_read": {**COUNTS, "division": whole}}
        body["info"]["stages"] = {name: {"data": "digits", "before": [told]} if how == "earlier" else told}
    write_json(root / "model" / "moee.json", body)
    record = checkpoint.load(root / "model").record
    assert len(record.images("val", str(root / "pictures"))) == 8
    changed(root, "grown")
    with pytest.raises(UserError, match="made on 40 images of it, there are 41 now"):
        record.images("val", str(root / "pictures"))


def test_stages_record_what_they_divided(made, tmp_path):
    shutil.copytree(made / "pictures", tmp_path / "other")
    assert cli.main([
        "finetune", str(made / "model"), "--data", str(tmp_path / "other"), "--epochs", "1", "--lr", "1e-6",
        "--out", str(tmp_path / "tuned"),
    ]) == 0  # fmt: skip
    stages = read_json(tmp_path / "tuned" / "moee.json")["info"]["stages"]
    assert stages["tuned"]["division"]["images"] == 40 and stages["tuned"]["data"] == str(tmp_path / "other")
    divided = checkpoint.load(tmp_path / "tuned").divisions
    assert {name for name, division in divided if division.images == 40} == {str(tmp_path / "other")}


def test_a_folder_that_lost_its_splits_is_not_divided(made, tmp_path):
    root = recorded(made, tmp_path / "r", {**COUNTS, "division": None})
    with pytest.raises(UserError, match="the artifact was made on splits of it, there are 40 now"):
        checkpoint.load(root / "model").record.images("val")


def test_extract_records_what_it_divided(made):
    session = Session(tiny_spec(), str(made / "pictures"), seed=SEED)
    assert session.data_facts()["division"] == asdict(session.train.division) and session.train.division.images == 40


@pytest.mark.parametrize("stage", ["now", "tuned", "earlier"])
def test_held_out_images_that_a_stage_was_trained_on_are_counted_and_said(made, tmp_path, caplog, stage):
    """A model looks better than it is on the images that it was made on, given as other data: their folder, or links to them."""
    root = recorded(made, tmp_path / "r", {**COUNTS, "division": None})
    changed(root, "split")
    pictures = root / "pictures"
    for image in (pictures / "train").glob("[b-e]/*.png"):
        (pictures / "val" / image.parent.name).mkdir(exist_ok=True)
        image.rename(pictures / "val" / image.parent.name / image.name)
    body = read_json(root / "model" / "moee.json")
    if stage != "now":
        told, body["data"] = {"data": str(pictures)}, "photos"
        body["info"]["stages"] = {"tuned": told if stage == "tuned" else {"data": "digits", "before": [told]}}
    write_json(root / "model" / "moee.json", body)
    record = checkpoint.load(root / "model").record
    said = f"are training images of {pictures}, which the model was made on"
    (root / "links").symlink_to(pictures / "train")
    for given in (pictures / "train", root / "links"):
        held_out = record.images("val", str(given))
        whole = f"{len(held_out)} of the {len(held_out)} held-out images {said}"
        assert [whole in note for note in held_out.notes] == [False, True]
        assert any(said in note for note in record.splits(str(given))[0].notes)
    for given in (pictures, pictures / "val", made / "pictures"):
        assert not any(said in note for note in record.images("val", str(given)).notes)
    if stage == "now":
        given = str(pictures / "train")
        assert cli.main(["verify", str(root / "export"), "--data", given, "--out", str(root / "checked")]) == 0
        assert said in caplog.text
        assert any(said in note for note in read_json(root / "checked" / "parity.json")["data_read"]["notes"])
    caplog.clear()
    moee, splits = checkpoint.load(root / "model"), load_splits(str(pictures / "train"), TRANSFORM)
    moee.check_images(str(pictures / "train"), *splits)  # as finetune and shrink do
    assert said in caplog.text and all(any(said in note for note in data.notes) for data in splits)


@pytest.mark.parametrize("layout", ["folder", "shards"])
def test_copies_of_images_that_a_stage_was_trained_on_are_counted(made, tmp_path, layout):
    """In another folder, and in shards."""
    root = recorded(made, tmp_path / "r", {**COUNTS, "division": None})
    changed(root, "split")
    pictures, given = root / "pictures", tmp_path / "given"
    copied = sorted((pictures / "train").rglob("*.png"))[:3]
    if layout == "folder":
        (given / "val" / "a").mkdir(parents=True)
        for path in [*copied, next((pictures / "val").rglob("*.png"))]:
            shutil.copy(path, given / "val" / "a" / f"other-{path.name}")
    else:
        pytest.importorskip("webdataset", reason="the extra `stream`")
        given.mkdir()
        for split, paths in (("train", sorted((pictures / "val").rglob("*.png"))), ("val", copied)):
            with tarfile.open(given / f"{split}.tar", "w") as archive:
                for path in paths:
                    archive.add(path, path.name)
    record = checkpoint.load(root / "model").record
    held_out = record.images("val", f"{'wds/' if layout == 'shards' else ''}{given}")
    of = f"3 of the {len(held_out)} held-out images are training images of {pictures}, 3 of them byte by byte under another name"
    assert any(of in note for note in held_out.notes), held_out.notes


def test_looking_at_many_images_that_a_stage_was_made_on_is_shown(made, tmp_path, monkeypatch):
    """Of 45,000 it takes seconds."""
    root = recorded(made, tmp_path / "r", {**COUNTS, "division": None})
    other, record, told = tmp_path / "other", checkpoint.load(root / "model").record, []
    shutil.copytree(root / "pictures", other)
    record.images("val", str(other), lambda *facts: told.append(facts))
    assert not told, "of few it takes no time"
    monkeypatch.setattr(trained_on, "MANY", 10)
    record.images("val", str(other), lambda *facts: told.append(facts))
    looked = f"compare with the 32 training images of {root / 'pictures'}"
    assert told == [(looked, 0, 1), (looked, 1, 1)]
