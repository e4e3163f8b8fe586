"""The model card: made of the manifest alone, hashed, and "not known" where nothing is known."""

import json
import shutil

import pytest

from exporter.belonging import artifact_ids
from moee.artifacts import checkpoint
from moee.artifacts.card import model_card
from moee.artifacts.model import MoeeModel
from moee.errors import UserError
from moee.methods.recipe import Recipe
from moee.models.licence import licence_of
from moee.models.model import ModelSpec
from moee.store.result_kinds import CARD
from tests.conftest import tiny_spec

RETENTION = {
    "dense_accuracy": 0.9, "accuracy": 0.85, "dense_accuracy_interval": [0.84, 0.94], "accuracy_interval": [0.78, 0.9],
    "images": 100, "labelled": 96, "class_cosine": 0.98765, "top1_agreement": None, "drop_interval_pp": [1.0, 9.5], "probe": True,
}  # fmt: skip
COST = {"dense": {"macs": 1000, "params": 2000}, "moee": {"macs": 600.4, "params": 1500}}


def stage(**changes):
    return {"data": "digits", "retention": RETENTION, "cost": COST, **changes}


def body(**changes):
    whole = {
        "model": tiny_spec().model_dump(mode="json"), "recipe": None, "data": "digits", "classes": ["a|b", "c`d"],
        "layers": [{"name": "blocks.0.mlp", "activation": "gelu", "experts": 4, "union": 90}], "attention": [], "merging": None,
        "info": {"stages": {"extracted": stage()}, "layers": [{"name": "blocks.0.mlp", "hidden": 128}]},
    }  # fmt: skip
    return {**whole, **changes}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from moee.models.model import load_model
    from tests.conftest import extract, method_options, tiny_images

    model, config = load_model(tiny_spec()), method_options(clustering="kmeans", clusters=4, cluster_tokens=500)
    extract(model, tiny_images(), config)
    path = tmp_path_factory.mktemp("card") / "artifact"
    checkpoint.save(MoeeModel(model, tiny_spec(), Recipe.of(config), "tiny"), path)
    return path


def test_the_card_is_the_manifest_in_words_and_hashed(saved, tmp_path):
    manifest = json.loads((saved / "moee.json").read_text())
    text = (saved / CARD).read_text()
    assert text == model_card(manifest), "a card that says more or other than the manifest is a second source"
    assert CARD in manifest["files"] and "clusters = 4" in text and "nothing was measured" in text
    checkpoint.save(checkpoint.load(saved), tmp_path / "again")
    assert (tmp_path / "again" / CARD).read_bytes() == (saved / CARD).read_bytes()


def test_a_changed_or_foreign_card_is_refused(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "copy")
    (copy / CARD).write_text("# Licence: MIT\n")
    with pytest.raises(UserError, match=f"{CARD} does not match the hash"):
        checkpoint.load(copy)
    manifest = json.loads((copy / "moee.json").read_text())
    digest = manifest["files"].pop(CARD)
    (copy / "moee.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"no hash of {CARD}"):
        checkpoint.load(copy)
    (copy / CARD).unlink()
    assert checkpoint.load(copy).data == "tiny", "an artifact of before cards is read as ever"
    assert artifact_ids(manifest) == artifact_ids({**manifest, "files": {**manifest["files"], CARD: digest}})


def test_accuracy_comes_with_its_interval_and_with_what_it_is_of():
    text = model_card(body())
    assert "| top-1 accuracy | 90.00% (95 % interval 84.00% to 94.00%) | 85.00% (95 % interval 78.00% to 90.00%) |" in text
    assert "Held out: 96 of 100 images that have a label, by a linear probe" in text
    assert "Same class as the dense model: not known." in text and "0.9877" in text
    assert "Drop 5.00 points of accuracy, 95 % interval 1.00 to 9.50." in text
    assert "Whether this model was chosen among others by the same images, the manifest does not say." in text
    chosen = model_card(body(info={**body()["info"], "chosen_among": 4}))
    assert "It was chosen among 4 models by these images" in chosen and "does not say" not in chosen
    assert "| MACs an image | 1,000 | 600 |" in text and "| `blocks.0.mlp` | experts | 4 | 90 | 128 |" in text


def test_the_last_stage_counts_and_every_data_set_is_named():
    unlabelled = {**RETENTION, "accuracy": None, "no_accuracy": "no labels"}
    tuned = stage(data="photos", retention=unlabelled, before=[{"data": "shards"}])
    text = model_card(body(info={"stages": {"extracted": stage(), "tuned": tuned}}))
    assert "Cut on `digits`." in text and "Tuned on `photos`, 2 times." in text and "Before that tuned on `shards`." in text
    assert "| top-1 accuracy | not known | not known |" in text and "Accuracy was not compared: no labels." in text
    assert "85.00%" not in text


def test_what_nobody_recorded_is_not_known():
    text = model_card({"model": body()["model"], "data": "digits"}, {"precision": "fp16"})
    for words in ("Licence of the weights: not known", "Layer by layer: not known", "likeness to the dense model: not known",
                  "Images read last: not known", "portable.onnx nothing: not known"):  # fmt: skip
        assert words in text
    broken = model_card(body(info={"stages": {"extracted": {"data": "digits", "unmeasured": "KeyboardInterrupt"}}}))
    assert "nothing was measured (measuring ended with `KeyboardInterrupt`)" in broken
    assert "Nothing: this is the dense model." in model_card(body(layers=[]))


def test_names_from_a_manifest_stay_names():
    text = model_card(body(model={**tiny_spec().model_dump(mode="json"), "name": "a`\n## Licence\nMIT"}))
    assert "\n## Licence" not in text and "`a' ## Licence MIT`" in text and "`c'd`" in text
    assert "`a\\|b.mlp`" in model_card(body(layers=[{"name": "a|b.mlp", "experts": 1, "union": 9}]))


@pytest.mark.parametrize("name, said", [
    ("vit_small_patch16_224", "apache-2.0"), ("vit_base_patch16_224.mae", "cc-by-nc-4.0"), ("vit_base_patch16_224.bamboo", None),
])  # fmt: skip
def test_licence_of_timms_pretrained_weights(name, said):
    found = licence_of(ModelSpec(name=name, timm_name=name, pretrained=True))
    assert (found or {}).get("name") == said and (found is None or found["stated_by"].startswith("timm "))


def test_licence_of_other_weights(tmp_path):
    def of(name, **fields):
        return licence_of(ModelSpec(name=name, timm_name="vit_small_patch16_224", **fields))

    file = str(tmp_path / "model.safetensors")
    assert of("vit_small_patch16_224", weights=file) is None and of("vit_small_patch16_224", random_seed=0) is None
    plain, swag = (
        licence_of(ModelSpec(name=f"torchvision:{name}", timm_name=name, library="torchvision", pretrained=True))
        for name in ("vit_b_16", "vit_h_14")
    )
    assert plain is None and swag is not None and "SWAG" in swag["name"]
    assert of("local-dir:m", weights=file) is None
    (tmp_path / "README.md").write_text("---\ntags:\n- timm\nlicense: cc-by-nc-4.0 # no sales\n---\n\nlicense: mit\n")
    assert of("local-dir:m", weights=file) == {"name": "cc-by-nc-4.0", "stated_by": "README.md beside the weights"}
    assert of("vit_small_patch16_224", weights=file) is None, "a checkpoint alone states nothing"
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"license": "mit"}, "license": "apache-2.0"}))
    assert of("local-dir:m", weights=file)["name"] == "mit"
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"license": "unknown"}}))
    (tmp_path / "README.md").write_text("license: mit\n")
    assert of("hf-hub:a/b", weights=file) is None


def test_a_model_is_one_line_in_a_notebook(tiny_moee):
    model, _, _, config, _ = tiny_moee
    stage = {
        "cost": {"moee": {"macs": 70}, "dense": {"macs": 100}},
        "retention": {"accuracy": 0.5, "dense_accuracy": 0.75, "class_cosine": 0.9876},
    }  # fmt: skip
    info = {"stages": {"extracted": {}, "tuned": stage}}
    shown = repr(MoeeModel(model, tiny_spec(), Recipe.of(config), "tiny", info=info))
    assert shown.endswith("experts, 70.0% of the MACs, accuracy 50.00% (dense 75.00%), cosine 0.9876)")
    assert repr(MoeeModel(model, tiny_spec(), None, "tiny")).endswith("not extracted)")
