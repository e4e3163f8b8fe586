"""`export --runtime-ops`: the graph with the operator of ONNX Runtime, from export to bundle."""

import platform
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from exporter import cli
from exporter.graph.export import export
from exporter.graph.runtime_graph import moee_graph, refuse_runtime, serves
from exporter.manifests import read_export
from exporter.parity import check_parity
from exporter.parity.operator import tapped_operator
from exporter.parity.taps import hooked, taps_of
from exporter.runners import OnnxRunner, operator_cache
from exporter.ship.cpu_bundle import write_cpu_bundle
from exporter.timing.latency import bench
from moee.errors import MissingDependency, UserError
from moee.layers.routed import routed_layers
from tests.exporter.conftest import rehash
from tests.plugins import operator_session


@pytest.fixture(autouse=True)
def compiled(monkeypatch, tmp_path):
    """A cache of its own, with the library that other tests have compiled."""

    def copy(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(operator_session.library(), folder / operator_cache.LIBRARY)

    monkeypatch.setenv("MOEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(operator_cache, "build_operator", copy)


def without_compiler(monkeypatch):
    def refuse(report=None):
        raise MissingDependency("a C++ compiler is not installed; run `apt-get install g++`")

    monkeypatch.setattr(operator_cache, "ensure_operator", refuse)


@pytest.fixture
def folder(tiny_export, tmp_path):
    export(tiny_export.moee, tmp_path / "export", source=tiny_export.root / "model", runtime_ops=True)
    return tmp_path / "export"


def test_the_graph_gives_what_the_portable_one_gives_and_is_what_runs(tiny_export, folder, caplog):
    manifest = read_export(folder)
    assert manifest["graphs"]["runtime"] == "runtime.onnx" and moee_graph(manifest, "cpu") == "runtime.onnx"
    assert moee_graph(manifest, "cuda") == "portable.onnx"
    images = tiny_export.data.images[:3].numpy()
    with OnnxRunner(folder / "runtime.onnx") as ours, OnnxRunner(folder / "portable.onnx") as standard:
        assert ours.name.endswith("CPU with MoeeFfn") and "MoeeFfn" not in standard.name
        np.testing.assert_allclose(ours.run(images)[0], standard.run(images)[0], rtol=1e-4, atol=1e-5)
    assert bench(folder, 2, runs=2).runtime.endswith("with MoeeFfn")


def test_verify_checks_it_and_a_wrong_neuron_fails(tiny_export, folder, capsys):
    result = check_parity(folder, tiny_export.moee, tiny_export.data, sizes=(1, 4))
    assert result and result.operator is not None and [b.batch for b in result.operator.batches] == [1, 4]
    model = onnx.load(folder / "runtime.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "MoeeFfn")
    node.input[6] = next(n for n in model.graph.node if n.op_type == "MoeeFfn" and n is not node).input[6]
    (folder / "runtime.onnx").write_bytes(model.SerializeToString())
    rehash(folder)
    result = check_parity(folder, tiny_export.moee, tiny_export.data, sizes=(1, 4))
    assert not result and result.operator is not None and all(b.passed for b in result.batches)
    assert {p.layer for p in result.operator.weight_problems} == {node.name}
    assert not all(b.passed for b in result.operator.batches)


@torch.inference_mode()
def test_the_operators_own_routes_can_be_read(tiny_export, folder):
    names = list(routed_layers(tiny_export.moee.model))
    x = tiny_export.data.images[:4]
    with tapped_operator(folder, names) as path, OnnxRunner(path) as runner:
        got = taps_of(runner.run(x.numpy()), names)
    with hooked(tiny_export.moee.model) as taps:
        tiny_export.moee.model(x)
        for name in names:
            assert torch.equal(got[name].route, taps[name].route)
            torch.testing.assert_close(got[name].result, taps[name].result, rtol=1e-4, atol=1e-4)


def test_without_a_library_the_standard_graph_is_used_and_it_is_said(tiny_export, tmp_path, monkeypatch, caplog):
    without_compiler(monkeypatch)
    export(tiny_export.moee, tmp_path / "export", source=tiny_export.root / "model", runtime_ops=True)
    assert "was written and not tried" in caplog.text
    assert "MoeeFfn" not in bench(tmp_path / "export", 1, runs=2).runtime
    assert "graph of standard operators is: a C++ compiler is not installed" in caplog.text
    result = check_parity(tmp_path / "export", tiny_export.moee, tiny_export.data, sizes=(1,))
    assert result and result.operator is not None and "C++ compiler" in result.operator.skipped
    assert not serves(routed_layers(tiny_export.moee.model), "fp32")


def test_a_damaged_library_in_the_cache_is_said(tmp_path, caplog):
    manifest = {"graphs": {"runtime": "runtime.onnx"}}
    library = tmp_path / "cache" / "operator" / operator_cache.source_sha256()[:16] / operator_cache.LIBRARY
    library.parent.mkdir(parents=True)
    content = bytearray(operator_session.library().read_bytes())
    content[32:64] = bytes(32)  # where its headers are
    library.write_bytes(content)
    assert moee_graph(manifest, "cpu") == "portable.onnx"
    assert "ONNX Runtime refuses the operator library" in caplog.text
    library.write_bytes(b"nothing")
    assert moee_graph(manifest, "cpu") == "portable.onnx" and "no operator library for ONNX Runtime" in caplog.text
    library.unlink()
    assert moee_graph(manifest, "cpu") == "runtime.onnx"


def test_what_the_operator_does_not_take_is_refused_before_any_work(tiny_export, tmp_path, capsys):
    words = ["export", str(tiny_export.root / "model"), "--out", str(tmp_path / "export"), "--runtime-ops"]
    assert cli.main([*words, "--precision", "fp16"]) == 2
    assert "the operator takes fp32, came --precision fp16" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="no layer of the model has several experts"):
        refuse_runtime({}, "fp32")
    assert not (tmp_path / "export").exists()


def test_an_activation_that_the_operator_lacks_goes_by_the_standard_graph(tiny_export, monkeypatch):
    monkeypatch.setattr("exporter.graph.runtime_graph.CPU_ACTIVATIONS", ("relu", "silu"))
    layers = routed_layers(tiny_export.moee.model)
    with pytest.raises(UserError, match="takes the activations relu, silu, and the model has gelu; leave it out"):
        refuse_runtime(layers, "fp32")
    assert not serves(layers, "fp32")


def run_bundle(folder, image):
    """run.py's standard output and standard error."""
    done = subprocess.run([sys.executable, str(folder / "run.py"), str(image)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_bundle_runs_it_and_says_when_it_cannot(tiny_export, folder, tmp_path):
    bundle = write_cpu_bundle(folder, tmp_path / "bundle")
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(image)
    faster, silent = run_bundle(bundle, image)
    assert not silent
    shipped = bundle / "operator" / platform.machine() / operator_cache.LIBRARY
    sums = (bundle / "SHA256SUMS").read_text()
    assert str(shipped.relative_to(bundle)) in sums and "operator/csrc/layer.cpp" in sums and "models/runtime.onnx" in sums
    (bundle / "operator" / operator_cache.LIBRARY).write_bytes(b"of another processor")
    standard, said = run_bundle(bundle, image)
    assert "the graph of standard operators is used" in said and "operator/build.sh compiles it here" in said
    assert standard.split()[:-1] == faster.split()[:-1]
    subprocess.run([bundle / "operator" / "build.sh"], check=True, capture_output=True)
    assert run_bundle(bundle, image) == (faster, "")
