"""The demo's acceptance figures, on the real pretrained model."""

import json

import pytest

from exporter.cli import main


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_demo(tmp_path):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    dense, moee = summary["dense"], summary["moee"]
    assert summary["schema"] == "moee.summary/1"
    assert dense["accuracy"] >= 0.97
    assert moee["macs"] <= 0.68 * dense["macs"]
    assert moee["accuracy_extracted"] >= 0.97 * dense["accuracy"]
    assert moee["accuracy_finetuned"] >= 0.985 * dense["accuracy"]
    assert summary["parity"]["passed"] and summary["parity"]["route_agreement"] >= 0.9999
    routed = [layer for layer in moee["layers"] if layer["experts"]]
    assert summary["engine"]["plugin_layers"] == len(routed)
    assert all((out / part).is_dir() for part in ("extracted", "tuned", "export", "engine"))
