"""The other JSON files, from someone else: any value anywhere is read or refused in one sentence; what is read can be used."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from exporter.clear_ablation import StoredCell
from exporter.engines.build import count_plugin_nodes, read_engines
from exporter.manifests import input_shape, read_engine, read_export
from exporter.report import collect, render
from exporter.runners import EngineRunner, check_plugin
from exporter.targets.result import read_result, timed
from exporter.timing import latency
from exporter.timing.profile import batch_profile
from moee.ablation.cells import read_cells
from moee.errors import MissingDependency, UserError
from moee.methods.recipe import Recipe, method_options
from moee.models.model import ModelSpec
from moee.planning.budget import checked_point
from moee.planning.emitted import Sending, Sent
from moee.planning.plan import read_plan
from moee.schema import checked
from moee.store.artifact import read_json, write_manifest
from moee.train.state import read_state, read_tensors
from plugins.library.embed import embed
from tests.conftest import tiny_spec
from tests.exporter.engines import write_engine
from tests.exporter.report_data import examples, plan_body
from tests.plugins.synthetic import write_kernels
from tests.untrusted.fuzzing import COUNTS, accepts_or_refuses, damaged, fuzz


def every_text(count, path: Path, load):
    """Write damaged forms of the file at `path` there and load each; returns how many loaded."""
    body, loaded = json.loads(path.read_text()), []

    @fuzz(count, damaged(body))
    def check(text):
        path.write_text(text)
        loaded.append(accepts_or_refuses(load))

    assert len(loaded) >= count // 2, "inputs were repeated"
    return sum(loaded)


@pytest.mark.parametrize("count", COUNTS)
def test_export_manifests(made, tmp_path, count):
    folder = Path(shutil.copytree(made / "export", tmp_path / "export"))

    def load():
        manifest = read_export(folder)
        assert batch_profile(folder, None, "4", None)[1] == 4
        channels, *sides = input_shape(manifest["input"])
        assert 0 < min(sides) <= max(sides) <= 4096 and len(manifest["input"]["std"]) == channels
        assert (manifest["cost"] or {"dense": {"macs": 1}})["dense"]["macs"] > 0
        ModelSpec(**manifest["model"])
        count_plugin_nodes(folder / manifest.get("graphs", {}).get("tensorrt", "tensorrt.onnx"))

    every_text(count, folder / "export.json", load)


@pytest.mark.parametrize("count", COUNTS)
def test_engine_manifests(made, tmp_path, count):
    """No library and no plan is opened unless its hash stands in the manifest."""
    folder = write_engine(tmp_path / "engine", made / "export")

    class Binding:
        """Everything up to the first use of the binding, which only an untouched pair of files may reach."""

        def __getattr__(self, name):
            raise MissingDependency("reached")

    def load():
        read_engines(folder)
        try:
            check_plugin(folder)
        except MissingDependency as missing:  # a library of a name that is not there: exit code 3
            raise UserError(str(missing)) from missing
        with pytest.raises(MissingDependency, match="reached"), EngineRunner(folder, binding=Binding(), device=object()):
            pass

    every_text(count, folder / "engine.json", load)


@pytest.mark.parametrize("count", COUNTS)
def test_plans(tmp_path, count):
    spec, config = tiny_spec(), method_options(clustering="kmeans", clusters=4)
    winner = {"method": "kmeans", "allocation": "share", "macs": 0.7, "recipe": Recipe.of(config).to_json(), "attention": 1.0}
    body = {"model": spec.model_dump(mode="json"), "data": "digits", "winner": winner, "points": [winner]}
    folder = tmp_path / "plan"
    folder.mkdir()
    write_manifest(folder, "plan.json", "moee.plan/2", body)
    assert read_plan(folder, spec) == Recipe.of(config) and read_plan(folder / "plan.json", spec) == Recipe.of(config)
    every_text(count, folder / "plan.json", lambda: read_plan(folder, spec))


POINT = {
    "method": "kmeans", "allocation": "share", "macs": 0.7, "params": 0.8, "cosine": 0.99, "token_cosine": 0.98, "accuracy": None,
    "drop": None, "latency": {"kind": "measured", "dense_ms": 2.0, "moee_ms": 1.0}, "recipe": {"steps": []},
}  # fmt: skip
CELL = {
    "schema": "moee.clear-cell/1", "setting": {"router": "linear", "rank": 96}, "config": {"seed": 0}, "dense_accuracy": 0.9,
    "accuracy": 0.8, "class_cosine": 0.99, "token_cosine": 0.9, "macs_share": 0.7, "router_accuracy": 0.6, "seconds": 3.5,
}  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
def test_times_of_a_device(tmp_path, count):
    """What passes is of the candidates that were sent, and a plan can be made of it."""
    ids, path = ["a" * 64, "b" * 64], tmp_path / "RESULT.json"
    sending = Sending(emit="e" * 64, dense="d" * 64, batch=8, precision="fp16", candidates=[Sent(id=each) for each in ids])
    state = {"power_mode": None, "clocks": [{"clock": "gpu", "mhz": 1020, "max_mhz": None}], "temperatures": []}
    times = {"gpu_ms": [1.5, 2.0], "host_ms": [2.5, 3.0]}
    body = {
        "schema": "moee.measured/1", "emit": sending.emit, "device": {"model": "x", "gpu": None}, "tensorrt": "10.3.0",
        "batch": 8, "precision": "fp16", "rounds": 2, "environment": [state, state], "dense": {"id": sending.dense, **times},
        "candidates": [{"id": ids[0], **times}, {"id": ids[1], "failed": "no engine was built"}],
    }  # fmt: skip
    path.write_text(json.dumps(body))

    def load():
        said = timed(read_result(path), sending, path)
        assert len(said.latencies) == 2 and 0 < said.dense["moee_ms"] < 1e7
        assert all(isinstance(one, str) or one["speedup"] > 0 for one in said.latencies)

    load()
    every_text(count, path, load)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["point", "cell"])
def test_results_of_interrupted_runs(tmp_path, kind, count):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"point": POINT, "cell": CELL}[kind]))
    read = checked_point if kind == "point" else lambda body, path: checked(StoredCell, body, path)

    def load():
        read(read_json(path), path)

    load()
    every_text(count, path, load)


@pytest.mark.parametrize("count", COUNTS)
def test_cells_of_an_ablation_count_as_not_run(tmp_path, count):
    (tmp_path / "cells").mkdir()
    body = {"schema": "moee.ablation-cell/2", "recipe": Recipe.of(method_options()).to_json(),
            "result": {"status": "dense", "seconds": 1.0}}  # fmt: skip
    path = tmp_path / "cells" / "0123456789abcdef.json"
    path.write_text(json.dumps(body))
    every_text(count, path, lambda: read_cells(tmp_path))


@pytest.mark.parametrize("count", COUNTS)
def test_states_of_an_interrupted_tuning(tmp_path, count):
    from safetensors.torch import save_file

    from moee.store.artifact import sha256_file

    trainable = {"w": torch.zeros(2, 3), "frozen": torch.zeros(1)}
    tensors = {f"{part}.w": torch.zeros(2, 3) for part in ("model", "best", "exp_avg", "exp_avg_sq")}
    frozen = {"model.frozen": torch.zeros(1), "best.frozen": torch.zeros(1)}
    save_file({**tensors, **frozen}, tmp_path / "state-1.safetensors")
    path = tmp_path / "state.json"
    path.write_text(json.dumps({
        "schema": "moee.finetune/3", "epoch": 1, "identity": {"data": "digits"}, "file": "state-1.safetensors",
        "sha256": sha256_file(tmp_path / "state-1.safetensors"), "step": 3.0, "train_loss": [0.5], "validation_loss": [0.6, 0.5],
        "best_epoch": 1, "lr": 1e-6,
    }))  # fmt: skip

    def load():
        read_tensors(tmp_path, read_state(path), trainable)

    load()
    every_text(count, path, load)
    for name, wrong in (("model.w", torch.zeros(3, 2)), ("best.w", torch.zeros(2, 3).double()), ("exp_avg_sq.w", torch.zeros(1))):
        save_file({**tensors, **frozen, name: wrong}, tmp_path / "t.safetensors")
        state = {"file": "../t.safetensors", "sha256": sha256_file(tmp_path / "t.safetensors")}
        with pytest.raises(UserError, match=f"holds no fitting {name}; remove"):
            read_tensors(tmp_path, state, trainable)


@pytest.mark.parametrize("count", COUNTS)
def test_kernel_manifests(tmp_path, count):
    """What goes from here into C++ tables is a name of the contract, a plain string or a number."""
    kernels = write_kernels(tmp_path / "kernels", sms=(87,), dtypes=("float16",))
    path = kernels / "kernels.json"
    body = json.loads(path.read_text())
    body["tactics"] = [tactic for tactic in body["tactics"] if tactic["name"] == "masked16"]
    body["kernels"] = [kernel for kernel in body["kernels"] if kernel["variant"] in ("members", "bm16")]
    body["kernels"] = [kernel for kernel in body["kernels"] if kernel["role"].startswith(("route", "masked"))]
    path.write_text(json.dumps(body))
    embed(kernels, tmp_path / "tables")

    every_text(count, path, lambda: embed(kernels, tmp_path / "tables"))


PARITY = {
    "schema": "moee.parity/1", "runtime": "onnxruntime", "images": 8, "precision": "fp32", "top1_agreement": 1.0, "passed": True,
    "batches": [{"batch": 1, "max_abs_error": 1e-6, "mean_abs_error": 1e-7, "tolerance_abs": 1e-5, "passed": True}],
    "route_agreement": {"blocks.0.mlp": 1.0}, "max_abs_error": 1e-6, "tolerance": {"max_relative_error": 1e-5},
    "layers": [{"name": "blocks.0.mlp", "agreement": 1.0, "flips": 0, "local": {"max_abs_error": 1e-6}}],
    "first_deviation": None, "accuracy": {"drop_pp": 0.1, "images": 8}, "cases": [{"group": "parity", "name": "batch 1"}],
}  # fmt: skip


def latency_body() -> dict:
    times = {f"p{p}": 1.0 + p / 100 for p in latency.PERCENTILES}
    return {
        "schema": "moee.latency/1", "runtime": "onnxruntime", "batch": 8, "threads": 2, "runs": 40, "dense_ms": times,
        "moee_ms": times, "speedup": 1.0, "speedup_p5": 0.9, "speedup_p95": 1.1, "ideal_speedup": 1.5,
        "verdict": {"winner": None, "text": "a tie"},
        "precision": "fp32", "throughput": {"dense": 10.0, "moee": 11.0}, "streams": 2, "cuda_graph": None,
        "layers": {"layers": [{"name": "blocks.0.mlp", "dense_ms": 1.0, "moee_ms": 0.5}], "other_dense_ms": 1.0,
                   "other_moee_ms": 1.0, "runs": 10}, "environment": [{"load": 0.1}, {"load": 0.2}],
    }  # fmt: skip


SUMMARY = {
    "schema": "moee.summary/1", "model": "x", "dataset": "digits", "dense": {"accuracy": 0.9, "macs": 10, "params": 10},
    "moee": {"accuracy_extracted": 0.8, "accuracy_finetuned": 0.9, "macs": 5, "params": 9, "layers": [{"name": "b"}]},
    "parity": {"passed": True}, "latency": {"speedup": 1.2}, "engine": None,
}  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["parity", "latency", "summary", "plan", "examples", "export", "engine"])
def test_what_a_report_shows(made, tmp_path, name, count):
    path = tmp_path / f"{name}.json"
    written = {
        "parity": PARITY, "latency": latency_body(), "summary": SUMMARY, "plan": {"schema": "moee.plan/2", **plan_body()},
        "examples": examples(),
    }  # fmt: skip
    if name in written:
        path.write_text(json.dumps(written[name]))
    elif name == "export":
        shutil.copy(made / "export" / "export.json", path)
    else:
        shutil.copy(write_engine(tmp_path / "engine", made / "export") / "engine.json", path)

    def load():
        page = render(collect([path], verify=False))
        assert "<script" in page and page.count("<script") == page.count("</script")

    load()
    every_text(count, path, load)


def test_a_trusted_engine_needs_no_manifest_but_its_files(made, tmp_path, caplog):
    folder = write_engine(tmp_path / "engine", made / "export")
    (folder / "engine.json").write_text("{}")
    with pytest.raises(UserError, match="an engine is code, and --trust-engine loads one that nothing vouches for"):
        read_engine(folder)
    assert read_engine(folder, trust=True)["plugin"]["file"] == "libmoee_plugin.so"
    assert "--trust-engine" in caplog.text
    shutil.copy(folder / "libmoee_plugin.so", folder / "other.so")
    with pytest.raises(UserError, match="2 libraries"):
        read_engine(folder, trust=True)
    (folder / "moee.plan").unlink()
    with pytest.raises(UserError, match="moee.plan not found"):
        read_engine(folder, trust=True)
