"""Runners: one interface, nothing falls back to another runtime, engines through doubles of TensorRT and the GPU."""

import numpy as np
import pytest
import torch

from exporter.runners import EngineRunner, OnnxRunner, TorchRunner
from exporter.verification.engine import run_engine
from moee.errors import MissingDependency, UserError
from tests.exporter.engines import LIBRARY, CpuDevice, FakeBinding, write_engine

IMAGES = np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32)


@pytest.fixture
def engine(tiny_export, tmp_path):
    return write_engine(tmp_path / "engine", tiny_export.folder())


def test_torch_and_onnx_runtime_agree_through_one_interface(tiny_export):
    with TorchRunner(tiny_export.moee.model) as ours, OnnxRunner(tiny_export.folder() / "portable.onnx", 1) as theirs:
        assert ours.outputs == theirs.outputs == ["output"]
        assert ours.name.startswith("torch ") and theirs.name.startswith("onnxruntime ")
        np.testing.assert_allclose(ours.run(IMAGES)[0], theirs.run(IMAGES)[0], atol=1e-5)
    with pytest.raises(RuntimeError, match="with statement"):
        theirs.run(IMAGES)


def test_absent_providers_are_named_with_what_they_need(tiny_export):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for provider, need in (("cuda", "cuDNN"), ("tensorrt", "TensorRT")):
        with pytest.raises(MissingDependency, match=f"does not work here; it needs.*{need}"):
            OnnxRunner(tiny_export.folder() / "portable.onnx", provider=provider).__enter__()
    with pytest.raises(UserError, match="unknown ONNX Runtime provider 'dml'; expected one of cpu, cuda, tensorrt"):
        OnnxRunner("x.onnx", provider="dml")


def test_engine_runs_with_its_plugin_loaded(engine, tiny_export):
    binding, device = FakeBinding(), CpuDevice()
    with EngineRunner(engine, binding=binding, device=device) as runner:
        assert binding.libraries == [str((engine / LIBRARY).resolve())]
        assert runner.outputs == ["output"] and runner.name == "tensorrt-rtx 1.0 GPU"
        first = runner.run(IMAGES)[0]
        second = runner.run(-IMAGES)[0]
    want = tiny_export.moee.model(torch.from_numpy(IMAGES)).detach().numpy()
    np.testing.assert_allclose(first, want, atol=1e-5)
    assert not np.allclose(first, second) and device.synchronized >= 4 and device.captured == 0


def test_engine_parity_uses_the_same_yardstick(engine, tiny_export):
    with EngineRunner(engine, binding=FakeBinding(), device=CpuDevice(), cuda_graph=True) as runner:
        errors = run_engine(runner, tiny_export.moee, tiny_export.data, "fp32", (1, 2, 4))
        assert runner.device.captured == 3  # one graph a batch size
    assert [e.batch for e in errors] == [1, 2, 4] and all(e.passed for e in errors)


def test_dense_engine_needs_no_plugin(engine):
    (engine / LIBRARY).unlink()
    binding = FakeBinding()
    with EngineRunner(engine, "dense", binding=binding, device=CpuDevice()) as runner:
        assert runner.run(IMAGES)[0].shape == (3, 10) and binding.libraries == []


def test_engine_problems_are_one_sentence(engine, monkeypatch):
    def entered(**kwargs):
        return EngineRunner(engine, **{"binding": FakeBinding(), "device": CpuDevice(), **kwargs}).__enter__()

    with pytest.raises(UserError, match="cannot load the plugin library"):
        entered(binding=FakeBinding(accepts=False))
    with pytest.raises(UserError, match="takes batches from 1 to 4 images; came 5"):
        entered().run(np.zeros((5, 3, 32, 32), np.float32))
    monkeypatch.setattr("exporter.runners.tensorrt_engine.device_count", lambda: 0)
    with pytest.raises(MissingDependency, match="needs an NVIDIA GPU with its driver"):
        entered(device=None)
    plan, library = (engine / "moee.plan").read_bytes(), (engine / LIBRARY).read_bytes()
    (engine / "moee.plan").write_bytes(plan + b" ")
    with pytest.raises(UserError, match="is not the plan that engine.json names"):
        entered()
    (engine / "moee.plan").write_bytes(plan)
    (engine / LIBRARY).write_bytes(library + b"!")
    with pytest.raises(UserError, match="is not the library that the engine was built with"):
        entered()
    (engine / LIBRARY).unlink()
    with pytest.raises(MissingDependency, match="is missing; copy it there, or run moee build again"):
        entered()
