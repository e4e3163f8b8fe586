"""Built engines on a GPU with TensorRT-RTX: parity with ONNX Runtime, CUDA-graph capture, latency against dense.

On the CPU the same engines are built and the plugin's calls compared (test_engine.py), and the plugin runs on a driver
double (tests/plugins/test_selftest.py).
"""

import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from exporter.engines.build import build_engines
from exporter.graph.export import export
from moee.artifacts.model import MoeeModel
from moee.methods.recipe import Recipe
from plugins.aot.build import build_kernels
from plugins.library.build import build_plugin
from tests.conftest import tiny_spec
from tests.exporter.graphs import write_export
from tests.plugins import built

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.trt,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra rtx"),
]


class Engine:
    """A plan on the current GPU; the plugin library is loaded before."""

    def __init__(self, plan: Path, plugin: Path | None = None):
        import tensorrt_rtx as trt

        self.runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        if plugin is not None:
            assert self.runtime.get_plugin_registry().load_library(str(plugin)) is not None
        self.engine = self.runtime.deserialize_cuda_engine(plan.read_bytes())
        assert self.engine is not None, f"{plan} cannot be loaded"
        self.context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.input, self.output = names[0], names[1]

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Bind `images` [batch, 3, H, W] on the GPU; returns the output tensor that `run` fills."""
        assert self.context.set_input_shape(self.input, tuple(images.shape))
        y = torch.full(tuple(self.context.get_tensor_shape(self.output)), float("nan"), device="cuda")
        self.context.set_tensor_address(self.input, images.data_ptr())
        self.context.set_tensor_address(self.output, y.data_ptr())
        return y

    def run(self) -> None:
        assert self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream)


@pytest.fixture(scope="module")
def plugin():
    major, minor = torch.cuda.get_device_capability()
    folder = built.ROOT / f"gpu-{major}{minor}"
    build_kernels(folder / "kernels", (10 * major + minor,))
    return build_plugin(folder / "plugin", folder / "kernels")


def test_parity_with_onnx_runtime(tiny_moee, plugin, tmp_path):
    model, _, _, config, _ = tiny_moee
    export(MoeeModel(model.eval(), tiny_spec(), Recipe.of(config), "tiny"), tmp_path / "export")
    build_engines(tmp_path / "export", tmp_path / "engine", plugin=plugin, batch=(1, 4, 8))
    engine = Engine(tmp_path / "engine" / "moee.plan", plugin)
    session = ort.InferenceSession(tmp_path / "export" / "portable.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3, 8):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        on_gpu = images.cuda()
        y = engine.prepare(on_gpu)
        engine.run()
        torch.cuda.synchronize()
        want = session.run(None, {"input": images.numpy()})[0]
        np.testing.assert_allclose(y.cpu().numpy(), want, atol=2e-3 * np.abs(want).max())


@pytest.fixture(scope="module")
def deit(plugin, tmp_path_factory):
    """DeiT-S in float16 with 16 experts of half the width: (dense engine, MoEE engine)."""
    folder = tmp_path_factory.mktemp("deit")
    shape = {"depth": 12, "dim": 384, "heads": 6, "size": 224, "patch": 16, "dtype": "float16"}
    write_export(folder / "export", **shape, experts=16, union=1536, width=768)
    build_engines(folder / "export", folder / "engine", plugin=plugin, batch=(1, 8, 8))
    return Engine(folder / "engine" / "dense.plan"), Engine(folder / "engine" / "moee.plan", plugin)


def test_engine_is_captured_in_a_cuda_graph(deit):
    engine = deit[1]
    images = torch.randn(8, 3, 224, 224, device="cuda")
    y = engine.prepare(images)
    engine.run()  # loads kernels and times tactics, which a capture forbids
    torch.cuda.synchronize()
    first = y.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.run()
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, first)


def test_latency_against_dense(deit, capsys):
    """Interleaved, 100 runs each; prints p50 and p95."""
    images = torch.randn(8, 3, 224, 224, device="cuda")
    outputs = [engine.prepare(images) for engine in deit]
    times: list[list[float]] = [[], []]
    for i in range(110):
        for engine, list_ in zip(deit, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            engine.run()
            end.record()
            end.synchronize()
            if i >= 10:
                list_.append(start.elapsed_time(end))
    assert all(torch.isfinite(y).all() for y in outputs)
    (dense, dense95), (moee, moee95) = (np.percentile(t, (50, 95)) for t in times)
    with capsys.disabled():
        print(f"DeiT-S, batch 8, float16: dense {dense:.3f} (p95 {dense95:.3f}) ms, MoEE {moee:.3f} (p95 {moee95:.3f}) ms")
    assert moee < dense


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_verify_and_bench_run_the_engines(tiny_export, plugin, tmp_path, precision):
    """The commands' own path: hashes, plugin, parity at the profile's batches, timing with and without CUDA graphs."""
    from exporter.timing.latency import bench
    from exporter.verification import verify

    export_dir = tiny_export.folder(precision)
    build_engines(export_dir, tmp_path / "engine", plugin=plugin, batch=(1, 4, 8))
    result = verify(export_dir, tiny_export.moee, tiny_export.data, sizes=(1, 4), engine=tmp_path / "engine")
    assert result, [case for case in result.cases() if case.failure]
    assert result.engine is not None and [b.batch for b in result.engine.batches] == [1, 4, 8]
    for cuda_graph in (False, True):
        timed = bench(export_dir, batch=4, runs=10, engine=tmp_path / "engine", cuda_graph=cuda_graph)
        assert timed.moee_ms["p50"] > 0 and timed.cuda_graph is cuda_graph
