"""CLEAR-MoE on the command line, the dispatch benchmark, the kernels' backend, the ablation."""

import json

import pytest
import torch

from exporter.clear_ablation import Grid, ablate, markdown, spread, summarise
from exporter.cli import main
from exporter.timing.dispatch_bench import Machine, bench_backend, bench_dispatch, stage_work, synthetic_layer
from exporter.timing.triton_dispatch import KernelDispatch, install
from moee.artifacts import checkpoint
from moee.errors import UserError
from moee.layers.clear import ClearFFN
from moee.layers.clear_dispatch import Sorted, backend
from moee.layers.routed import routed_layers
from moee.methods.clear_moe.options import ClearOptions
from moee.parallel.group import SOLO
from moee.stages.extract import run_extract
from moee.stages.session import Session
from moee.stages.space import Space
from moee.store.artifact import read_manifest
from tests.conftest import tiny_spec
from tests.exporter.test_clear_export import random_layer


class TinySession(Session):
    """A session on tiny images, without data from disk."""

    def __init__(self):
        from moee.data.transform import model_transform
        from moee.models.model import load_model
        from tests.conftest import tiny_images

        torch.manual_seed(0)
        self.spec, self.source, self.report, self.group = tiny_spec(num_classes=4), "tiny", lambda *a: None, SOLO
        self.trial, self.space = None, Space(SOLO)
        self.dense = load_model(self.spec)
        self.transform = model_transform(self.dense)
        self.train, self.held_out = tiny_images(40), tiny_images(24)
        self._reference = self._train_outputs = self.made = None
        self._proved, self._shapes, self._started, self._left = set(), {}, {}, {}


@pytest.fixture
def artifact(tmp_path):
    session = TinySession()
    config = ClearOptions(rank=8, residual_rank=4, experts=3, calibration_images=40)
    run_extract(session.spec, "tiny", config, tmp_path / "model", session=session)
    return tmp_path / "model"


def test_extract_writes_scores_ranks_and_costs(artifact):
    manifest = read_manifest(artifact, "moee.json", "moee.model/2")
    assert manifest["recipe"]["steps"][-1]["method"] == "clear-moe"
    assert manifest["info"]["layers"]
    for layer in manifest["info"]["layers"]:
        assert layer["ranks"] == [8, 4, 8, 4] and layer["router_accuracy"] > 0.5 and layer["scores"]["sensitivity"] > 0
    stage = manifest["info"]["stages"]["extracted"]
    assert stage["cost"]["moee"]["macs"] < stage["cost"]["dense"]["macs"]
    kept = stage["retention"]
    assert kept["accuracy"] is None and "--random-weights drew" in kept["no_accuracy"]
    assert all(isinstance(layer, ClearFFN) for layer in routed_layers(checkpoint.load(artifact).model).values())


def test_inspect_knows_clear_layers(artifact, capsys):
    assert main(["inspect", str(artifact), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert all(layer["experts"] == 3 and layer["macs"] < layer["dense_macs"] for layer in layers)


def test_a_damaged_artifact_is_refused(artifact):
    path = artifact / "moee.json"
    manifest = json.loads(path.read_text())
    manifest["layers"][0]["ranks"] = [9, 4, 8, 4]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"up_in should have shape \[21, 32\], came \[20, 32\]"):
        checkpoint.load(artifact)


@pytest.mark.parametrize("flags, message", [
    (["--method", "clear-moe", "--rank", "8"], "--rank by hand needs --residual-rank too"),
    (["--method", "clear-moe", "--keep", "0.9"], "--keep is for method experts, static, corp or lowrank, and not for clear-moe"),
    (["--rank", "8"], "--rank is for method clear-moe, and not for experts"),
    (["--method", "clear-moe", "--experts", "8", "--calibration-images", "4"], "is smaller than the 8 experts"),
    (["--method", "clear-moe", "--compensation", "none"], "--compensation: expected one of mean, refit"),
])  # fmt: skip
def test_flags_that_do_not_belong(flags, message, tmp_path, capsys):
    assert main(["extract", "vit_tiny_patch16_224", "--data", "digits", "--out", str(tmp_path / "x"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_kernels_compute_the_residual():
    layer = random_layer(experts=3, ranks=(6, 2, 5, 3), dim=16, hidden=32)
    parts = layer.parts()
    x = torch.randn(21, 16, generator=torch.Generator().manual_seed(0))
    routes = torch.arange(21) % 2  # the third expert gets none
    with torch.no_grad():
        rows, plan = KernelDispatch().permute(x, routes, 3)
        got = KernelDispatch().residual(rows, plan, parts.up)
        other, sorted_plan = Sorted().permute(x, routes, 3)
        expected = Sorted().combine(Sorted().residual(other, sorted_plan, parts.up), sorted_plan)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    install()
    assert backend("triton").name == "triton"
    with pytest.raises(UserError, match="widths that are multiples of 16"):
        KernelDispatch().residual(x[:, :10], plan, parts.up)


def test_stage_work_counts_what_the_layer_costs():
    layer = synthetic_layer(64, 128, 4, 16, 4)
    for name, masked in (("sorted", False), ("masked", True)):
        work = stage_work(name, layer, 100)
        products = work["routing"][0] + work["shared products"][0] + work["expert products"][0]
        extra = 100 * (64 + 128)  # additions
        biases = 2 * 100 * 2 * 4 * (64 + 128) if masked else 0  # the exported masked form adds them by a product
        assert products - extra + biases == 2 * 100 * layer.macs_per_token(masked=masked)
    assert stage_work("masked", layer, 100)["permutation"] == (0.0, 0.0)
    assert stage_work("loop", layer, 100)["expert products"][1] > stage_work("sorted", layer, 100)["expert products"][1]


def test_verdict_follows_the_machine_balance():
    layer, x = synthetic_layer(64, 128, 4, 16, 4), torch.randn(50, 64)
    for balance, bound in ((1e-9, "compute"), (1e9, "memory")):
        stages = bench_backend("sorted", layer, x, 1, Machine(balance, 1.0, 1))
        assert next(s for s in stages if s.stage == "shared products").bound == bound
    assert next(s for s in stages if s.stage == "permutation").bound == "memory"
    masked = bench_backend("masked", layer, x, 1, Machine(1.0, 1.0, 1))
    assert next(s for s in masked if s.stage == "combine").bound == "none"


def test_bench_dispatch_reports_everything(tmp_path, capsys):
    out = tmp_path / "dispatch.json"
    flags = ["--tokens", "64", "--dim", "32", "--hidden", "64", "--rank", "8", "--residual-rank", "4", "--runs", "2"]
    assert main(["bench-dispatch", *flags, "--threads", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {s["backend"] for s in result["stages"]} >= {"loop", "sorted", "masked"}
    assert [f["form"] for f in result["forms"]] == ["dense", "sorted", "masked"] and result["machine"]["balance"] > 0
    assert main(["bench-dispatch", "--rank", "999"]) == 2 and main(["bench-dispatch", "--backend", "warp"]) == 2
    assert bench_dispatch.__doc__


def test_ablation_resumes_and_summarises(tmp_path):
    session = TinySession()
    grid = Grid(
        router=("linear", "random"), rank=(8,), experts=(2,), calibration_images=(20,), seeds=2, residual_rank=2,
        centre=(("router", "linear"), ("rank", 8), ("experts", 2), ("calibration_images", 20)),
    )  # fmt: skip
    cells = ablate(session, grid, "star", tmp_path)
    assert len(cells) == 4 and len(list(tmp_path.glob("*-s*.json"))) == 4
    marked = tmp_path / "linear-8-2-20-s1.json"
    changed = json.loads(marked.read_text()) | {"class_cosine": -5.0}
    marked.write_text(json.dumps(changed))
    again = ablate(session, grid, "star", tmp_path)
    assert [c["class_cosine"] for c in again].count(-5.0) == 1, "a finished cell was computed again"
    rows = summarise(again)
    assert [r["setting"]["router"] for r in rows] == ["linear", "random"] and rows[0]["seeds"] == 2
    table, _, why = markdown(rows).partition("\n\n")
    assert rows[0]["class_cosine"][1] > 1 and table.count("\n") == 3 and why.startswith("Accuracy is not compared: ")
    with pytest.raises(UserError, match="made with rank 6, now 5"):
        ablate(session, Grid(**{**grid.__dict__, "residual_rank": 3}), "star", tmp_path)
    (tmp_path / "linear-8-2-20-s0.json").unlink()  # the others are looked at before this one is computed
    with pytest.raises(UserError, match="made with rank 6, now 5"):
        ablate(session, Grid(**{**grid.__dict__, "residual_rank": 3}), "star", tmp_path)
    assert not (tmp_path / "linear-8-2-20-s0.json").exists()
    assert len(Grid().settings("star")) == 10 and len(Grid().settings("full")) == 108
    assert spread([None]) is None and spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
