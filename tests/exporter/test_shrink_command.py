"""`moee shrink` as a user types it."""

import shutil

import pytest

from exporter import cli
from moee.artifacts import checkpoint
from moee.artifacts.stages import latest
from moee.layers.routed import routed_layers
from moee.store.artifact import read_json, write_json


def measured(model, out):
    """A copy of a model of four experts a layer, as `extract` leaves it: with what it measured, shares of the experts too."""
    shutil.copytree(model, out)
    body = read_json(out / "moee.json")
    kept = {"images": 48, "dense_accuracy": 1.0, "accuracy": 0.9, "top1_agreement": 0.9, "class_cosine": 0.9, "token_cosine": 0.9}
    cost = {who: {"macs": 1e9, "params": 1e6} for who in ("dense", "moee")}
    shares = {layer["name"]: [0.25] * 4 for layer in body["layers"]}
    body["info"]["stages"] = {"extracted": {"data": body["data"], "retention": kept, "cost": cost, "shares": shares}}
    write_json(out / "moee.json", body)
    return out


def test_from_a_model_to_a_verified_export_of_fewer_experts(tiny_export, tmp_path, capsys):
    model = str(measured(tiny_export.root / "model", tmp_path / "model"))
    words = ["shrink", model, "--experts", "3", "--refit-tokens", "2000", "--tokens", "2000", "--out", str(tmp_path / "fewer")]
    assert cli.main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 to 3" in said and "3 experts fewer" in said and "moee export" in said
    fewer = checkpoint.load(tmp_path / "fewer")
    assert [layer.num_experts for layer in routed_layers(fewer.model).values()] == [3, 3, 3]
    assert latest(fewer.info)["config"]["experts"] == 3 and latest(fewer.info)["cost"]
    assert all(len(shares) == 3 for shares in latest(fewer.info)["shares"].values())
    assert cli.main(["inspect", str(tmp_path / "fewer")]) == 0
    assert cli.main(["export", str(tmp_path / "fewer"), "--out", str(tmp_path / "export")]) == 0
    assert cli.main(["verify", str(tmp_path / "export"), "--images", "50"]) == 0


@pytest.mark.parametrize(
    "words, says",
    [
        ((), "nothing is asked for; give --experts, --specialise or both"),
        (("--experts", "4"), "--experts 4 merges nothing: a layer has 4 experts at most"),
        (("--specialise", "--data", "/nowhere"), "/nowhere"),
        (("--specialise", "--memory", "100M"), "--memory allows 100 MiB; give a larger --memory, or "),
    ],
)
def test_what_is_refused(tiny_export, tmp_path, capsys, words, says):
    assert cli.main(["shrink", str(tiny_export.root / "model"), *words, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()
