"""What a report shows of images: counted from the models' own answers, cut from the images, and bounded."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from exporter.plots import examples as made
from exporter.plots import write_examples
from exporter.plots.data import expert_patches, trace_routes
from exporter.report import collect, render
from moee.artifacts.model import MoeeModel
from moee.data.image_set import TensorSet
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.methods.recipe import Recipe, method_options
from moee.models.model import load_model
from tests.conftest import extract, teach, tiny_images, tiny_spec
from tests.exporter.report_data import examples as written
from tests.exporter.report_data import jpeg, write_run
from tests.exporter.test_report import Page

SPEC = tiny_spec(num_classes=4).model_copy(update={"random_seed": None, "pretrained": True})  # its head is no draw: it is taught


@pytest.fixture
def models():
    """A taught model, the same cut into experts whose answer 1 wins too often, and their images."""
    data = tiny_images()
    data.classes = ("red", "green", "<b>blue", "grey")
    dense = teach(load_model(tiny_spec(num_classes=4)), data).eval()
    model = teach(load_model(tiny_spec(num_classes=4)), data).eval()
    options = method_options(clustering="kmeans", clusters=4, cluster_tokens=500)
    extract(model, data, options)
    with torch.no_grad():
        margin = model(data.images).sort(1).values.diff(dim=1)[:, -1]
        model.head.bias[1] += float(margin.median())
    return MoeeModel(model.eval(), SPEC, Recipe.of(options), "digits"), dense, data


def picture(entry):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["picture"])))).astype(float)


def test_classes_and_changed_images_are_those_of_the_models(models):
    moee, dense, data = models
    body = made.make_examples(moee, dense, data, trace_routes(moee, data))
    assert body["data"] == data.name != moee.data, "the images that are shown, and not those that the model was made on"
    with torch.no_grad():
        before, after = (m(data.images).argmax(1) for m in (dense, moee.model))
    labels = torch.tensor(data.labels)
    lost = (before == labels) & (after != labels)
    assert 0 < int(lost.sum()) < 36, "else the test shows nothing"
    for row in body["classes"]["rows"]:
        own = labels == data.classes.index(row["name"])
        right = [int((answer == labels)[own].sum()) for answer in (before, after)]
        assert [row["images"], row["dense"], row["moee"]] == [12, *right]
    changes = [row["moee"] - row["dense"] for row in body["classes"]["rows"]]
    assert changes == sorted(changes) and changes[0] < 0, "worst first"
    changed = body["changed"]
    assert (changed["lost"], changed["gained"]) == (int(lost.sum()), 0)
    assert changed["lost"] + changed["other"] == int((before != after).sum())
    first = int(lost.nonzero()[0])
    entry = changed["shown"][0]
    assert (entry["label"], entry["dense"], entry["moee"]) == (data.classes[labels[first]], data.classes[labels[first]], "green")
    pixels = model_transform(moee.model).pixels(data.load(first)).clamp(0, 1) * 255
    assert np.abs(picture(entry) - pixels.permute(1, 2, 0).numpy()).mean() < 12, "levels, after JPEG"


def test_strips_are_the_pixels_of_the_nearest_tokens(models):
    moee, dense, data = models
    trace = trace_routes(moee, data)
    body = made.make_examples(moee, dense, data, trace)["experts"]
    patches = expert_patches(trace)["layers"]
    assert [layer["name"] for layer in body["layers"]] == list(patches) and body["left_out"] == {}
    for layer in body["layers"]:
        shares = [row["share"] for row in layer["experts"]]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=1e-4)
        for row in layer["experts"]:
            found = picture(row)
            for position, place in enumerate(patches[layer["name"]][row["expert"]]["patches"]):
                image = model_transform(moee.model).pixels(data.load(place["image"])).clamp(0, 1)
                tile = image[:, place["top"] : place["top"] + 8, place["left"] : place["left"] + 8] * 255
                shown = found[:8, position * 9 : position * 9 + 8]
                assert np.abs(shown - tile.permute(1, 2, 0).numpy()).mean() < 30, "levels, after JPEG"


def test_layers_with_one_expert_are_left_out_and_said(models):
    moee, dense, data = models
    trace = trace_routes(moee, data)
    trace.experts["blocks.1.mlp"] = 1
    found = made.make_examples(moee, dense, data, trace)["experts"]
    assert found["left_out"] == {"blocks.1.mlp": made.ONE_EXPERT} and len(found["layers"]) == 2


def test_pictures_are_bounded(models, monkeypatch):
    def taken(body):
        rows = [row for layer in body["experts"]["layers"] for row in layer["experts"]]
        return sum(len(entry["picture"]) for entry in [*rows, *body["changed"]["shown"]])

    moee, dense, data = models
    trace = trace_routes(moee, data)
    whole = made.make_examples(moee, dense, data, trace)
    monkeypatch.setattr(made, "MAX_BYTES", taken(whole) - 1)
    less = made.make_examples(moee, dense, data, trace)
    assert taken(less) < taken(whole) and [len(layer["experts"]) for layer in less["experts"]["layers"]] == [3] * 3
    assert [layer["of"] for layer in less["experts"]["layers"]] == [4] * 3, "what is left out shows"


def test_the_file_says_what_cannot_be_shown(models, tmp_path):
    """A head drawn at random names no class; images of one channel are pictures, those of four are none."""
    _, _, data = models
    model = load_model(tiny_spec(in_chans=4))
    data = TensorSet("four", data.images.repeat(1, 2, 1, 1)[:, :4], data.labels, data.classes)
    options = method_options(clustering="kmeans", clusters=4, cluster_tokens=500)
    extract(model, data, options)
    moee = MoeeModel(model.eval(), tiny_spec(in_chans=4), Recipe.of(options), "digits")
    path = write_examples(moee, data, tmp_path / "examples.json", images=20)
    body = json.loads(path.read_text())
    assert body["images"] == 20 and body["of_images"] == 48 and body["classes"]["rows"] == [] and body["classes"]["why"]
    assert not [row for layer in body["experts"]["layers"] for row in layer["experts"] if "picture" in row]
    text = Page(render(collect([path]))).text
    assert "Accuracy of classes is not compared" in text and "no picture" in text and "20 of 48 held-out images" in text
    path.write_text("mine")
    with pytest.raises(UserError, match="not examples for a report"):
        write_examples(moee, data, path)
    assert path.read_text() == "mine"


def test_the_page_shows_them(tmp_path):
    page = Page(render(collect([write_run(tmp_path / "run")])))
    for said in ("<b>zero 20 90.0% (18 of 20) 75.0% (15 of 20) −15.0", "3 lost the right class, 0 gained it, 1 changed otherwise",
                 "label <b>zero dense <b>zero MoEE one", "blocks.0.mlp: 4 experts, the busiest takes 70% of the patches",
                 "expert 2: it gets no patch", "expert 3: below 0.1%",
                 "expert 1: 70.0%", "blocks.2.mlp: it has one expert", "40 of 60 held-out images"):  # fmt: skip
        assert said in page.text, said
    images = [a for t, a in page.tags if t == "img"]
    assert len(images) == 4 and all(a["src"].startswith("data:image/jpeg;base64,") and a["alt"] for a in images)


@pytest.mark.parametrize("bad", ["javascript:alert(1)", "PHN2Zz4=", 7, None, "/9j/" * 300_000])
def test_only_small_jpeg_is_embedded(tmp_path, bad):
    """An SVG, an address, no text at all, or more than a page may hold."""
    run = write_run(tmp_path / "run")
    body = written() | {"belongs_to": {}}
    body["changed"]["shown"] = [{**jpeg(), "picture": bad}]
    (run / "plots" / "examples.json").write_text(json.dumps(body))
    page = Page(render(collect([run])))
    thumbs = [a for t, a in page.tags if t == "img" and a["alt"].startswith("image of label")]
    assert thumbs == [] and "no picture" in page.text
