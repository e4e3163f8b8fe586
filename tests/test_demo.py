"""The demo's acceptance figures, on the real pretrained model."""

import json
from pathlib import Path

import numpy as np
import pytest

from exporter.cli import main
from tests.exporter.damage import change_store

XSD = Path(__file__).parent / "exporter" / "junit.xsd"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_demo(tmp_path):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    dense, moee = summary["dense"], summary["moee"]
    assert summary["schema"] == "moee.summary/1" and summary["shipped"] == "kmeans-4"
    assert dense["accuracy"] >= 0.75 and moee["macs"] <= 0.7 * dense["macs"] and moee["cosine"] >= 0.95
    reached = [moee[f"accuracy_{stage}"] for stage in ("finetuned", "extracted") if moee[f"accuracy_{stage}"] is not None]
    assert reached[0] >= dense["accuracy"] - 0.03, "the demo's budget: 400 crops tell accuracies apart by about 2.5 points"
    new = summary["confirmed"]["retention"]
    assert new["images"] >= 900 and new["accuracy"] >= new["dense_accuracy"] - 0.01, "crops that nothing was chosen by"
    assert sum(share <= 0.6 for share in moee["largest_share"].values()) > len(moee["layers"]) / 2, "experts at work"
    for timing in ("one/latency.json", "latency.json"):  # at one image, and at eight
        assert json.loads((out / timing).read_text())["verdict"]["low"] > 1, timing
    assert summary["parity"]["passed"] and summary["parity"]["route_agreement"] >= 0.9999
    routed = [layer for layer in moee["layers"] if layer["experts"]]
    assert summary["engine"]["plugin_layers"] == len(routed)
    assert all((out / part).is_dir() for part in ("plan", "extracted", "export", "verify", "bundle", "engine"))

    export, layer = out / "export", routed[5]["name"]
    pytest.importorskip("xmlschema").XMLSchema(XSD).validate(str(out / "verify" / "junit.xml"))
    (out / "engine" / "libmoee_plugin.so").unlink()
    assert main(["verify", str(export), "--engine", str(out / "engine")]) == 3
    random = np.random.default_rng(0)
    change_store(export, layer, "w_down", lambda w: w * (1 + 0.01 * random.standard_normal(w.shape, np.float32)))
    assert main(["verify", str(export), "--images", "0", "--out", str(out / "damaged")]) == 1
    assert json.loads((out / "damaged" / "parity.json").read_text())["first_deviation"]["layer"] == layer
