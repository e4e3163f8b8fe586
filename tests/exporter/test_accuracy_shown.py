"""Every accuracy is shown with its interval, or with the reason why there is none; stages on other data are not mixed."""

import io
import json
from pathlib import Path

import pytest
import torch

from exporter.clear_ablation import Grid, markdown, summarise
from exporter.commands.models.plan import points_table, verdict
from exporter.compression.state import Compressed
from exporter.demo import summary_of
from exporter.report import write_report
from exporter.report.agreement import _accuracy_notes
from exporter.terminal.ui import plain_console, retention_notes, stage_table, title_of
from exporter.verification.accuracy import compare_accuracy
from moee.measure.accuracy import wilson
from tests.exporter.report_data import write_run

COST = {"dense": {"macs": 2e9, "params": 2e7}, "moee": {"macs": 1e9, "params": 1.5e7}}


def stage(accuracy, dense=0.95, data="digits", images=40, **more):
    kept = {
        "images": images, "labelled": images, "no_accuracy": "", "dense_accuracy": dense, "accuracy": accuracy,
        "top1_agreement": 0.9, "class_cosine": 0.99, "token_cosine": None,
    }  # fmt: skip
    for key in ("dense_accuracy", "accuracy"):
        value = kept[key]
        kept[f"{key}_interval"] = None if value is None else list(wilson(value * images, images).interval)
    return {"retention": {**kept, **more}, "cost": COST, "data": data}


def text_of(table):
    console = plain_console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return " ".join(console.export_text().replace("│", " ").split())


def test_a_stage_table_has_the_intervals():
    text = text_of(stage_table({"stages": {"extracted": stage(0.9), "tuned": stage(0.925)}}, "t"))
    assert "accuracy 95.00% 90.00% 92.50%" in text
    assert "95 % interval 83.5% to 98.6% 76.9% to 96.0% 80.1% to 97.4%" in text


def test_a_manifest_of_before_intervals_shows_them_too():
    old = stage(0.9)
    for key in ("dense_accuracy_interval", "accuracy_interval", "labelled", "no_accuracy"):
        del old["retention"][key]
    del old["data"]
    assert "95 % interval 83.5% to 98.6% 76.9% to 96.0%" in text_of(stage_table({"stages": {"extracted": old}}, "t"))


def test_stages_on_other_images_have_the_dense_accuracy_on_the_same():
    info = {"stages": {"extracted": stage(0.9), "tuned": stage(0.5, 0.6, "other")}}
    text = text_of(stage_table(info, title_of(info, "m", "other")))
    assert "m on other (extracted on digits)" in text
    assert "accuracy 90.00% 50.00%" in text and "dense, same images 95.00% 60.00%" in text
    none = {"stages": {"extracted": stage(None, None), "tuned": stage(None, None, "other")}}
    assert "same images" not in text_of(stage_table(none, "t"))
    same = {"stages": {"extracted": stage(0.9), "tuned": stage(0.9)}}
    assert title_of(same, "m", "digits") == title_of({"stages": {}}, "m", "digits") == "m on digits"


NOTE = "the held-out images changed between these stages, so that their figures are of different images"


@pytest.mark.parametrize(("tuned", "noted"), [
    (stage(0.9, 0.9) | {"held_out": "b"}, True), (stage(0.9) | {"held_out": "b"}, True),
    (stage(None, None) | {"held_out": "b"}, True),
    (stage(0.9, images=41), True), (stage(0.9, 0.9) | {"held_out": "a"}, False), (stage(0.9) | {"held_out": "a"}, False),
])  # fmt: skip
def test_stages_on_images_that_changed_are_told_apart(tuned, noted):
    """In a folder of one name: by the hash of its held-out images, their number, and what the dense model is right on."""
    measured = tuned["retention"]["accuracy"] is not None
    first = stage(0.9, 0.95) if measured else stage(None, None)
    text = text_of(stage_table({"stages": {"extracted": {**first, "held_out": "a"}, "tuned": tuned}}, "t"))
    assert (NOTE in text) == noted
    apart = noted or tuned["retention"]["dense_accuracy"] == 0.9
    assert ("dense, same images" in text) == (apart and measured)


def test_a_table_says_why_there_is_no_accuracy_and_of_how_many_images_one_is():
    lacking = stage(None, None, no_accuracy="[x] has no labels")
    assert "accuracy is not compared: [x] has no labels" in text_of(stage_table({"stages": {"extracted": lacking}}, "t"))
    assert retention_notes([stage(0.9, labelled=30)["retention"]]) == ["accuracy on 30 of 40 images that have a label"]
    assert retention_notes([stage(0.9)["retention"]]) == []


def test_the_accuracy_of_a_probe_is_called_so():
    probed = stage(0.9, probe=True)
    by_probe = "accuracy on 40 images, by a linear probe on the features"
    assert by_probe in text_of(stage_table({"stages": {"extracted": probed}}, "t"))
    assert _accuracy_notes({"extracted": probed["retention"]}) == [by_probe.replace("accuracy", "Accuracy") + "."]
    logits, labels = torch.eye(2).repeat(20, 1), torch.arange(40) % 2
    assert compare_accuracy(logits, logits, labels, probe=True).counted == "40 images, by a linear probe on the features"
    assert compare_accuracy(logits, logits, labels).counted == "40 images"


def test_a_plan_shows_them():
    point = {
        "method": "static", "allocation": "share", "macs": 0.6, "params": 0.7, "cosine": 0.98, "accuracy": 0.9,
        "accuracy_interval": [0.769, 0.96], "latency": None, "recipe": {}, "attention": 1.0,
    }  # fmt: skip
    plan = {"model": {"name": "m"}, "data": "d", "points": [point], "front": [], "winner": point, "margins": {}}
    table = text_of(points_table(plan))
    assert "90.00%" in table and "76.9% to 96.0%" in table
    measured = {"images": 40, "labelled": 30, "no_accuracy": ""}
    assert "accuracies are of 30 of 40 images that have a label, with 95 % intervals" in verdict({**plan, "accuracy": measured})
    probed = verdict({**plan, "accuracy": {**measured, "labelled": 40, "probe": True}})
    assert "accuracies are of 40 images, by a linear probe on the features, with 95 % intervals" in probed
    timed = [{**point, "latency": {"dense_ms": 10.0, "moee_ms": ms}} for ms in (8.0, 5.0)]
    passed = verdict({**plan, "winner": timed[0], "passed_over": [timed[1]]})
    assert any("static (share) was measured faster, 2.00x beside 1.25x, which is within the noise" in line for line in passed)
    lacking = {**measured, "no_accuracy": "d has no labels"}
    assert "accuracy is not compared: d has no labels" in verdict({**plan, "accuracy": lacking})


def test_the_demos_summary_keeps_its_keys_and_has_the_intervals_beside_them():
    info = {"stages": {"extracted": stage(0.9), "tuned": stage(0.925)}, "layers": [], "peak_memory_bytes": 1}
    made = {"extracted": info, "tuned": info}
    parity = {"runtime": "", "max_abs_error": 0, "route_agreement": {"a": 1.0}, "top1_agreement": 1, "passed": True}
    keys = ("runtime", "batch", "dense_ms", "moee_ms", "speedup", "ideal_speedup")
    compressed = Compressed(Path("x"), "static", "extracted", (), 1.0)
    summary = summary_of("m", "digits", compressed, made, parity=parity, latency=dict.fromkeys(keys, 1), engine=None)
    nothing = summary_of("m", "digits", compressed, {}, parity=parity, latency=None, engine=None)
    assert nothing.keys() == summary.keys() and nothing["moee"]["accuracy_extracted"] is None and nothing["latency"] is None
    assert summary["dense"]["accuracy"] == 0.95 and summary["dense"]["accuracy_images"] == 40
    assert {"macs", "params"} <= summary["dense"].keys() and summary["moee"]["accuracy_finetuned"] == 0.925
    for part, key in (("dense", "accuracy"), ("moee", "accuracy_extracted"), ("moee", "accuracy_finetuned")):
        assert summary[part][f"{key}_interval"] == list(wilson(summary[part][key] * 40, 40).interval)


def test_an_ablation_of_clear_moe_has_them():
    setting = dict(Grid().centre)
    cell = {
        "setting": setting, "dense_accuracy": 0.95, "class_cosine": 0.9, "token_cosine": 0.9, "router_accuracy": 0.9,
        "macs_share": 0.7,
    }  # fmt: skip
    cells = [{**cell, "accuracy": value, "labelled": 40, "no_accuracy": ""} for value in (0.85, 0.95)]
    assert "90.00 ± 7.07 (76.9 to 96.0)" in markdown(summarise(cells))
    assert "90.00 ± 0.00 |" in markdown(summarise([{**cell, "accuracy": 0.9}])), "cells of before"
    lacking = {**cell, "accuracy": None, "labelled": 0, "no_accuracy": "d has no labels"}
    assert "Accuracy is not compared: d has no labels." in markdown(summarise([lacking]))


def edited(path, change):
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


@pytest.fixture
def page(tmp_path):
    write_run(tmp_path / "run")

    def make():
        write_report([tmp_path / "run"], tmp_path / "r.html", force=True)
        return (tmp_path / "r.html").read_text()

    return make


def test_a_report_has_the_intervals_of_older_artifacts_too(page):
    text = page()
    low, high = wilson(0.94 * 40, 40).interval
    assert f"94.00% ({low:.1%} to {high:.1%})" in text and f"{low:.1%} to {high:.1%}; dense 95.00%, −1.00 points" in text


def test_a_report_says_why_nothing_was_measured(page, tmp_path):
    def lack(body):
        for stage in body["info"]["stages"].values():
            stage["retention"] |= {"accuracy": None, "dense_accuracy": None, "no_accuracy": "digits has no labels"}

    for name in ("extracted", "tuned"):
        edited(tmp_path / "run" / name / "moee.json", lack)
    skipped = {"group": "accuracy", "name": "drop", "skipped": "too few"}
    edited(tmp_path / "run" / "parity.json", lambda b: b.update(accuracy=None, no_accuracy="too few", cases=[skipped]))
    text = page()
    assert "Accuracy is not compared: digits has no labels." in text and "accuracy is not compared" in text
    assert "Accuracy of the exported graphs was not measured: too few." in text and "not checked, accuracy drop: too few" in text


def test_a_report_tells_stages_on_images_that_changed_apart(page, tmp_path):
    def change(body):
        for name, stage in body["info"]["stages"].items():
            stage["held_out"] = f"of {name}"

    assert "dense, on the same images" not in page()
    edited(tmp_path / "run" / "tuned" / "moee.json", change)
    text = page()
    assert "dense, on the same images" in text and f"T{NOTE[1:]}." in text


def test_a_report_names_the_data_of_each_stage(page, tmp_path):
    def tune(body):
        body["data"] = "other"
        stages = body["info"]["stages"]
        stages["extracted"]["data"], stages["tuned"]["data"] = "digits", "other"
        stages["tuned"]["retention"] |= {"dense_accuracy": 0.6, "accuracy": 0.5}

    edited(tmp_path / "run" / "tuned" / "moee.json", tune)
    text = page()
    assert "tiny on other (extracted on digits)" in text and "dense, on the same images" in text
    assert "moee extract tiny --data digits" in text and "moee finetune extracted --data other" in text


def test_a_report_names_the_data_that_the_exported_graphs_were_measured_on(page, tmp_path):
    """`verify --data OTHER` left no trace of OTHER: its accuracy stood under a title that names the artifact's own images."""
    text = page()
    assert "moee verify export --out verify" in text
    edited(next((tmp_path / "run").rglob("parity.json")), lambda body: body.update(data="/somewhere/other"))
    text = page()
    assert "images of other, with 95 % intervals" in text and "moee verify export --data /somewhere/other --out verify" in text


def test_a_report_names_the_images_that_int8_was_calibrated_on(page, tmp_path):
    edited(next((tmp_path / "run").rglob("export.json")), lambda body: body.update(
        precision="int8", quantization={"moee": {"images": 7, "data": "/somewhere/other"}}))  # fmt: skip
    assert "--precision int8 --calibration-images 7 --data /somewhere/other --out export" in page()


@pytest.mark.parametrize(("images", "line"), [
    ("/somewhere/other", "moee bench export --data /somewhere/other"), ("digits", "moee bench export --batch"),
    ("noise", "moee bench export --batch"),
])  # fmt: skip
def test_a_report_names_the_images_that_were_timed(page, tmp_path, images, line):
    edited(next((tmp_path / "run").rglob("latency.json")), lambda body: body.update(images=images))
    assert line in page()
