"""What was made in hours is not lost because measuring it fails, or is interrupted."""

import pytest

from exporter.terminal.failures import explain
from exporter.terminal.ui import stage_table
from moee.artifacts import checkpoint
from moee.artifacts.inspection import inspect_artifact
from moee.config import FinetuneConfig
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.methods.recipe import make_recipe, method_options
from moee.models.model import ModelSpec
from moee.stages.extract import run_extract
from moee.stages.finetune import run_finetune
from moee.stages.session import Session
from tests.conftest import tiny_images, tiny_spec

STATIC = method_options(clustering="none", keep=0.8, compensation="mean")


@pytest.fixture(scope="module")
def session():
    return Session(tiny_spec(), "digits")


def failing(error):
    def measure(*args, **kwargs):
        raise error

    return measure


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (UserError("none of the images could be read"), 2, "none of the images could be read"),
        (RuntimeError("a bug"), 1, "unexpected RuntimeError: a bug"),
        (MemoryError(), 3, "out of memory"),
    ],
)
def test_an_extracted_model_is_written_without_its_measurements(session, tmp_path, monkeypatch, error, code, sentence):
    monkeypatch.setattr(session, "measure", failing(error))
    out = tmp_path / "out"
    with pytest.raises(type(error)) as raised:
        run_extract(session.spec, "digits", STATIC, out, session=session)
    told = explain(raised.value)
    assert told[0] == code and told[1].startswith(sentence)
    assert told[1].endswith(f"the extracted model is in {out}, without measurements; the same command with --force makes them")
    moee = checkpoint.load(out)
    assert len(routed_layers(moee.model)) == 3 and moee.info["stages"]["extracted"]["unmeasured"] == type(error).__name__
    assert inspect_artifact(moee).moee["macs"] > 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_place_that_is_taken_during_the_work_does_not_cost_the_model(session, tmp_path, monkeypatch, fails):
    out, measure = tmp_path / "out", session.measure

    def measuring(*args):
        out.mkdir()
        (out / "mine").write_text("x")
        if fails:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(session, "measure", measuring)
    with pytest.raises(KeyboardInterrupt if fails else UserError) as raised:
        run_extract(session.spec, "digits", STATIC, out, session=session)
    (kept,) = [path for path in tmp_path.iterdir() if path != out]
    assert f"output folder {out} exists;" in explain(raised.value)[1]
    assert explain(raised.value)[1].endswith(f"; the result is kept as {kept}")
    assert len(routed_layers(checkpoint.load(kept).model)) == 3 and [path.name for path in out.iterdir()] == ["mine"]


def test_a_tuned_model_is_written_and_measured_by_the_next_call(session, tmp_path, monkeypatch, caplog):
    run_extract(session.spec, "digits", STATIC, tmp_path / "extracted", session=session)
    config = FinetuneConfig(epochs=1, batch_size=256)
    with monkeypatch.context() as patch:
        patch.setattr(session, "measure", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt) as raised:
            run_finetune(tmp_path / "extracted", config, tmp_path / "tuned", session=session)
    assert "the tuned model is in" in explain(raised.value)[1]
    kept = checkpoint.load(tmp_path / "tuned")
    assert "retention" not in kept.info["stages"]["tuned"] and kept.info["stages"]["tuned"]["best_epoch"] in (0, 1)
    monkeypatch.setattr("moee.train.finetuning.Trainer.backward", failing(AssertionError("no step is taken again")))
    again = run_finetune(tmp_path / "extracted", config, tmp_path / "tuned", force=True, session=session)
    assert again.info["stages"]["tuned"]["retention"]["images"] == 719
    assert not (tmp_path / "tuned.resume").exists()
    for name, tensor in kept.model.state_dict().items():
        assert tensor.equal(again.model.state_dict()[name]), name


def test_tuning_a_model_whose_measurements_are_missing(session, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(session, "measure", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run_extract(session.spec, "digits", STATIC, tmp_path / "extracted", session=session)
    tuned = run_finetune(tmp_path / "extracted", FinetuneConfig(epochs=1, batch_size=512), tmp_path / "tuned", session=session)
    assert [str(column.header) for column in stage_table(tuned.info, "").columns] == ["", "dense", "tuned"]


def test_a_full_disk_at_the_end_is_said_as_well(session, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "measure", failing(UserError("no images")))
    monkeypatch.setattr(checkpoint, "save", failing(OSError(28, "No space left on device")))
    with pytest.raises(UserError) as raised:
        run_extract(session.spec, "digits", STATIC, tmp_path / "out", session=session)
    assert "the extracted model could not be written" in explain(raised.value)[1]


def test_costs_are_counted_before_the_work(tmp_path, monkeypatch):
    session = Session(tiny_spec(), "digits")
    monkeypatch.setattr("moee.stages.session.dense_macs", failing(AssertionError("Expected gradient function to be set")))
    monkeypatch.setattr("moee.methods.convert.convert_layers", failing(AssertionError("too late")))
    with pytest.raises(UserError, match="MACs of tiny cannot be counted .Expected gradient function to be set"):
        run_extract(session.spec, "digits", STATIC, tmp_path / "out", session=session)
    assert not list(tmp_path.iterdir())


def test_a_cost_out_of_reach_is_said_before_the_work(tmp_path, monkeypatch):
    session = Session(tiny_spec(), "digits")
    monkeypatch.setattr("moee.methods.convert.convert_layers", failing(AssertionError("too late")))
    with pytest.raises(UserError, match="--target-macs 0.05: the routed MLPs hold .* stays above"):
        run_extract(session.spec, "digits", method_options("static", target_macs=0.05), tmp_path / "out", session=session)


def test_a_model_with_attention_pooling_is_extracted(tmp_path):
    kwargs = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    spec = ModelSpec(name="siglip", timm_name="vit_base_patch16_siglip_224", kwargs=kwargs, random_seed=0)
    moee = run_extract(spec, "digits", STATIC, tmp_path / "out")
    assert moee.info["stages"]["extracted"]["cost"]["moee"]["macs"] < moee.info["stages"]["extracted"]["cost"]["dense"]["macs"]
    status = {layer["name"]: layer["status"] for layer in moee.info["layers"]}
    assert status == {
        "blocks.0.mlp": "routed", "blocks.1.mlp": "routed", "attn_pool.mlp": "dense: sees one token an image"
    }  # fmt: skip
    assert checkpoint.load(tmp_path / "out").info["layers"] == moee.info["layers"]


def test_more_experts_than_neurons_are_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr("moee.methods.convert.convert_layers", failing(AssertionError("too late")))
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (tiny_images(8), tiny_images(8)))
    with pytest.raises(UserError, match="--experts 129 is more than the 128 neurons of `blocks.0.mlp`"):
        run_extract(tiny_spec(), "tiny", make_recipe("moefication", values={"experts": 129}), tmp_path / "out")
    with pytest.raises(UserError, match="--attention-macs 0.2: heads keep at least half"):
        run_extract(tiny_spec(), "tiny", make_recipe("static", values={"attention_macs": 0.2}), tmp_path / "out")


@pytest.mark.parametrize(
    "target, said", [(0.05, "so the result stays above"), (0.95, "merged tokens alone leave 0.8"), (0.7, "")]
)
def test_a_cost_beside_narrower_heads_is_judged_before_the_work(monkeypatch, tmp_path, target, said):
    begun = AssertionError("the work began")
    monkeypatch.setattr("moee.methods.heads.narrowing.width_losses", failing(begun))
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (tiny_images(8), tiny_images(8)))
    recipe = make_recipe("static", values={"attention_macs": 0.5, "target_macs": target})
    with pytest.raises(UserError if said else AssertionError, match=said or "the work began"):
        run_extract(tiny_spec(), "tiny", recipe, tmp_path / "out")
